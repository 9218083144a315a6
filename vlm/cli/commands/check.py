"""`vlm check`: a model checked by its behaviour."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.cli import console
from vlm.cli.options import Command, Place, Shared, chosen_device, names, unless_auto
from vlm.settings import option

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared
    place: Place
    model: str = option(
        "model directory, hub id, or big_vision .npz; also one with two towers (SigLIP, CLIP)",
        place=True,
        metavar="MODEL",
    )
    tokenizer: Path | None = option("sentencepiece .model of a .npz", default=None, metavar="FILE")
    data: Path | None = option(
        "training data (JSONL) whose labels to check", default=None, flags=("-d",), metavar="FILE"
    )
    image_root: Path | None = option("folder of the images", default=None, metavar="DIR", shown="that of the data")
    max_text_length: int | None = option("as in training: count longer texts", default=None, metavar="N", least=1)
    stage_manifest: Path | None = option("STAGE/manifest.json", default=None, metavar="FILE", shown="that of the run")
    only: str | None = option("names of checks, as in the second column of the output", default=None, metavar="A,B")
    json: bool = option("print the report as JSON", default=False)


def run(options: Options) -> int:
    """The report on stdout, progress on stderr."""
    from vlm.check import runner
    from vlm.check.checks.stage import read_manifest
    from vlm.checkpoints.directory import load
    from vlm.checkpoints.two_towers import has_two_towers
    from vlm.data.reading import read
    from vlm.exchange.exporting import export

    device = chosen_device(options.place.device)
    console.quiet_transformers()
    only = None if options.only is None else names(options.only)
    # What a person can have mistyped is refused before the model is read.
    if has_two_towers(options.model):
        runner.choose(only, runner.DUAL_CHECKS)
        report = _two_towers(options, only, device)
        print(report.to_json() if options.json else report.table())
        return console.OK if report.ok else console.FAILED
    runner.choose(only)
    if options.stage_manifest is not None:
        read_manifest(options.stage_manifest)
    data = None if options.data is None else read(options.data, image_root=options.image_root)[0]
    log.info("opening %s", options.model)
    model, processor = load(
        options.model, dtype=unless_auto(options.place.dtype), device=device, tokenizer=options.tokenizer
    )
    report = runner.run(
        model,
        processor,
        data=data,
        stage_manifest=options.stage_manifest,
        only=only,
        path=options.model,
        max_text_length=options.max_text_length,
        export=export,
    )
    print(report.to_json() if options.json else report.table())
    return console.OK if report.ok else console.FAILED


def _two_towers(options: Options, only: list[str] | None, device: Any) -> Any:
    """The report on an image tower with its text tower."""
    from vlm.check import runner
    from vlm.errors import ConfigError
    from vlm.siglip.loading import load

    of_training = {
        "--data": options.data,
        "--image-root": options.image_root,
        "--max-text-length": options.max_text_length,
        "--stage-manifest": options.stage_manifest,
    }
    given = [flag for flag, value in of_training.items() if value is not None]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: of a model that writes text; {options.model} has two towers, leave it out"
        )
    log.info("opening %s", options.model)
    model, processor = load(
        options.model, dtype=unless_auto(options.place.dtype), device=device, tokenizer=options.tokenizer
    )
    return runner.run_dual(model, processor, only=only, path=options.model)


COMMAND = Command(
    name="check",
    help="check a model by its behaviour",
    details=(
        "One line per check: ok, FAIL or n/a, the measured number and its limit."
        " Exit code 0: no check failed; 1: one did; 2: the model or the data cannot be opened."
    ),
    options=Options,
    run=run,
    group="judge",
)
