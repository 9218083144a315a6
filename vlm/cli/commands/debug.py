"""`vlm debug`: the named intermediates of one batch."""

import sys
from dataclasses import dataclass
from pathlib import Path

from vlm.cli import console
from vlm.cli.options import Command, Place, Shared, chosen_device, unless_auto
from vlm.settings import option


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared
    place: Place
    images: list[str] = option(
        "image files, each a sample; none: a prompt alone", default=(), place=True, metavar="IMAGE"
    )
    model: str = option("model directory or hub id", flags=("-m",))
    prompt: str = option("what the model is asked", default="caption en")
    suffix: str | None = option("what it should say: makes a training batch with a loss", default=None, metavar="TEXT")
    dump: Path | None = option("write them to this file, as safetensors", default=None, metavar="FILE")


def run(options: Options) -> int:
    """A table of the intermediates on stdout."""
    device = chosen_device(options.place.device)
    console.quiet_transformers()
    from vlm.checkpoints.directory import load
    from vlm.files import publishing_file, rust_disk_errors
    from vlm.measure.dump import intermediates, table

    model, processor = load(options.model, dtype=unless_auto(options.place.dtype), device=device)
    count = max(1, len(options.images))
    suffix = None if options.suffix is None else [options.suffix] * count
    images = [[image] for image in options.images] or None
    batch = processor(images, [options.prompt] * count, suffix, ids=list(options.images) or ["the prompt"])
    found = intermediates(model, batch)
    print(table(found))
    if options.dump is not None:
        from safetensors.torch import save_file

        with publishing_file(options.dump) as path, rust_disk_errors():
            save_file(found, path)
        print(f"written to {options.dump}", file=sys.stderr)
    return console.OK


COMMAND = Command(
    name="debug",
    help="show what one batch is inside a model",
    details=(
        "One forward, and for what enters and leaves each part and block its shape and range; --dump keeps the tensors,"
        " so that two models, versions or devices can be compared where they begin to differ."
    ),
    options=Options,
    run=run,
    group="judge",
)
