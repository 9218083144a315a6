"""`vlm new`: a model from a vision tower, a projector and a decoder."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from vlm.cli import console
from vlm.cli.options import add_overrides, at_least, command

DETAILS = (
    "Tower and decoder keep their weights bit for bit; the projector and the rows of new tokens are drawn. The model is"
    " float32 and ready for `vlm train`."
)
SETTABLE = ("image", "projector", "fuse")


def add(commands: Any) -> None:
    """Register the command."""
    parser = command(commands, run, "new", "build a model from a vision tower and a decoder", DETAILS)
    parser.add_argument(
        "--encoder",
        required=True,
        metavar="A",
        help="vision tower: directory, hub id or .npz; A+B fuses two, A@378+B@432 at their own sizes",
    )
    parser.add_argument(
        "--decoder", required=True, metavar="B", help="Gemma 1, 2 or 3, alone or in a PaliGemma: directory or hub id"
    )
    parser.add_argument(
        "--projector",
        default="linear",
        metavar="KIND",
        help="linear (as PaliGemma), mlp, pixel_shuffle, pool, resampler, identity (linear)",
    )
    parser.add_argument("--out", "-o", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument(
        "--image-size",
        type=at_least(1),
        metavar="N",
        help="side in pixels; another one resamples the tower's positions",
    )
    parser.add_argument(
        "--layer",
        type=int,
        nargs="+",
        default=[-1],
        metavar="N",
        help="of the tower: -1 the last with its norm, -2 the one before without, several are concatenated (-1)",
    )
    parser.add_argument(
        "--tokenizer", metavar="T", help="directory, hub id or sentencepiece .model (the decoder's own)"
    )
    parser.add_argument(
        "--encoder-kind", metavar="K", help="read the tower as another kind: siglip2_naflex takes any aspect ratio"
    )
    parser.add_argument("--max-num-patches", type=at_least(1), metavar="N", help="budget of a NaFlex tower (256)")
    parser.add_argument(
        "--naflex",
        choices=("fill", "native"),
        help="NaFlex images below the budget: enlarged to it (fill, as SigLIP 2) or kept as they are (native)",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of the weights that are drawn (0)")
    add_overrides(
        parser,
        "image, projector and fuse settings: --set image.resample=bicubic projector.depth=3 fuse.grid=[16,16]",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: Namespace) -> int:
    """`vlm new`: what was made, as the table of `vlm info`."""
    changed = settings_of(options.overrides)
    if options.max_num_patches is not None:
        changed["image"]["max_num_patches"] = options.max_num_patches
    if options.naflex is not None:
        changed["image"]["naflex"] = options.naflex
    console.quiet_transformers()
    from vlm.build import new, stored_rows
    from vlm.checkpoints import save
    from vlm.checkpoints.export import check_out, published
    from vlm.info import describe, table

    check_out(options.out)  # before minutes of loading
    model, processor = new(
        options.encoder,
        {"kind": options.projector, **changed["projector"]},
        options.decoder,
        options.tokenizer,
        encoder_kind=options.encoder_kind or options.encoder_class,
        image_size=options.image_size,
        image=changed["image"],
        layer=options.layer,
        fuse=changed["fuse"] or None,
        seed=options.seed,
    )
    with published(options.out) as folder:
        save(model, processor, folder)
    facts = describe((model, processor))
    facts["new_vocabulary_rows"] = facts["vocabulary"] - stored_rows(options.decoder)
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        print(table(facts))
        print(f"new rows    {facts['new_vocabulary_rows']:,} of the vocabulary; {len(processor.tokenizer):,} tokens")
    print(f"written to {options.out}", file=sys.stderr)
    return console.OK


def settings_of(overrides: list[str]) -> dict[str, dict[str, Any]]:
    """`image.resample=bicubic` as {"image": {"resample": "bicubic"}}; values are YAML.

    Raises:
        ConfigError: no `image.NAME=VALUE` or `projector.NAME=VALUE`.
    """
    from vlm.errors import ConfigError
    from vlm.settings import parse_yaml

    result: dict[str, dict[str, Any]] = {part: {} for part in SETTABLE}
    for override in overrides:
        name, equals, value = override.partition("=")
        part, dot, key = name.strip().partition(".")
        if not (equals and dot and key) or part not in SETTABLE:
            raise ConfigError(
                f"--set {override}: expected image.NAME=VALUE, projector.NAME=VALUE or fuse.NAME=VALUE, such as"
                f" image.resample=bicubic"
            )
        result[part][key] = parse_yaml(value, where=f"--set {override}")
    return result
