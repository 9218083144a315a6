"""`vlm new`: a model from a vision tower, a projector and a decoder."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from vlm.cli import console
from vlm.cli.options import add_overrides, at_least, command, sizes

DETAILS = (
    "From its parts (--encoder, --decoder), or from a whole model in another geometry (--from). Tower and decoder keep"
    " their weights bit for bit; a new projector and the rows of new tokens are drawn. A model of parts is float32 and"
    " ready for `vlm train`."
)
SETTABLE = ("image", "projector", "fuse")


def add(commands: Any) -> None:
    """Register the command."""
    parser = command(commands, run, "new", "build a model, or change the geometry of one", DETAILS)
    parser.add_argument(
        "--from",
        dest="start",
        metavar="M",
        help="go on with a whole model in another geometry (--image-size, --max-num-patches, --naflex, --layer,"
        " --projector, --encoder-kind), all other weights as they are",
    )
    parser.add_argument(
        "--encoder",
        metavar="A",
        help="vision tower: directory, hub id or .npz; A+B fuses two, A@378+B@432 at their own sizes",
    )
    parser.add_argument("--decoder", metavar="B", help="Gemma 1, 2 or 3, alone or in a PaliGemma: directory or hub id")
    parser.add_argument(
        "--projector",
        metavar="KIND",
        help="linear (as PaliGemma), mlp, pixel_shuffle, pool, resampler, identity (linear; with --from the model's)",
    )
    parser.add_argument("--out", "-o", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument(
        "--image-size",
        type=sizes,
        metavar="N",
        help="side in pixels; another one resamples the tower's positions (A,B for a fused tower, with --from)",
    )
    parser.add_argument(
        "--layer",
        type=int,
        nargs="+",
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
    _check(options, changed)
    console.quiet_transformers()
    from vlm.build.assembly import stored_rows
    from vlm.checkpoints.saving import save
    from vlm.exchange.publishing import check_out, published
    from vlm.measure.info import describe, table

    check_out(options.out)  # before minutes of loading
    model, processor = _changed(options, changed) if options.start else _new(options, changed)
    with published(options.out) as folder:
        save(model, processor, folder)
    facts = describe((model, processor))
    if not options.start:
        facts["new_vocabulary_rows"] = facts["vocabulary"] - stored_rows(options.decoder)
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        print(table(facts))
        if not options.start:
            print(
                f"new rows    {facts['new_vocabulary_rows']:,} of the vocabulary; {len(processor.tokenizer):,} tokens"
            )
    print(f"written to {options.out}", file=sys.stderr)
    return console.OK


def _check(options: Namespace, changed: dict[str, dict[str, Any]]) -> None:
    """Refuse what does not go together.

    Raises:
        ConfigError: a part of a new model beside --from, or neither a model nor its parts.
    """
    from vlm.errors import ConfigError

    if not options.start:
        if options.encoder is None or options.decoder is None:
            raise ConfigError(
                "give --encoder and --decoder, the parts of a new model, or --from, a model to go on with"
            )
        return
    parts = [f"--{name}" for name in ("encoder", "decoder", "tokenizer") if getattr(options, name) is not None]
    parts += ["--set fuse"] if changed["fuse"] else []
    if parts:
        raise ConfigError(
            f"--from goes on with a whole model, which has its {', '.join(parts)} already; leave them out"
        )


def _new(options: Namespace, changed: dict[str, dict[str, Any]]) -> Any:
    from vlm.build.assembly import new

    return new(
        options.encoder,
        {"kind": options.projector or "linear", **changed["projector"]},
        options.decoder,
        options.tokenizer,
        encoder_kind=options.encoder_kind or options.encoder_class,
        image_size=options.image_size,
        image=changed["image"],
        layer=options.layer or [-1],
        fuse=changed["fuse"] or None,
        seed=options.seed,
    )


def _changed(options: Namespace, changed: dict[str, dict[str, Any]]) -> Any:
    """The model of --from in the geometry that was asked for; it stays in its number format."""
    from vlm.checkpoints.directory import load
    from vlm.checkpoints.geometry import with_geometry
    from vlm.errors import ConfigError

    model, processor = load(options.start)
    projector = options.projector
    if changed["projector"]:
        own = model.config.projector_config
        projector = {**(own if projector in (None, own["kind"]) else {"kind": projector}), **changed["projector"]}
    made = with_geometry(
        model,
        processor,
        image_size=options.image_size,
        image=changed["image"],
        layer=options.layer,
        projector=projector,
        encoder_kind=options.encoder_kind,
        seed=options.seed,
    )
    if made[0] is model and made[1] is processor:
        raise ConfigError(
            f"nothing would change of {options.start}; give another --image-size, or what else is to change"
        )
    return made


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
