"""`vlm new`: a model from a vision tower, a projector and a decoder."""

import json as jsons
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlm.cli import console
from vlm.cli.options import Command, Shared, sizes
from vlm.errors import ConfigError
from vlm.settings import option, parse_yaml

SETTABLE = ("image", "projector", "fuse")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a new model"""

    encoder: str | None = option(
        "vision tower: directory, hub id or .npz; A+B fuses two, A@378+B@432 at their own sizes",
        default=None,
        metavar="A",
    )
    decoder: str | None = option(
        "Gemma 1, 2 or 3, alone or in a PaliGemma: directory or hub id", default=None, metavar="B"
    )
    tokenizer: str | None = option(
        "directory, hub id or sentencepiece .model", default=None, metavar="T", shown="the decoder's own"
    )


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How it reads images"""

    projector: str | None = option(
        "linear (as PaliGemma), mlp, pixel_shuffle, pool, resampler, identity",
        default=None,
        metavar="KIND",
        shown="linear; with --from the model's",
    )
    image_size: Any = option(
        "side in pixels; another one resamples the tower's positions (A,B for a fused tower, with --from)",
        default=None,
        metavar="N",
        parse=sizes,
    )
    layer: list[int] | None = option(
        "of the tower: -1 the last with its norm, -2 the one before without, several are concatenated",
        default=None,
        metavar="N",
        shown="-1",
    )
    encoder_kind: str | None = option(
        "read the tower as another kind: siglip2_naflex takes any aspect ratio", default=None, metavar="K"
    )
    max_num_patches: int | None = option("budget of a NaFlex tower", default=None, metavar="N", least=1, shown="256")
    naflex: Literal["fill", "native"] | None = option(
        "NaFlex images below the budget: enlarged to it (fill, as SigLIP 2) or kept as they are (native)", default=None
    )
    set: list[str] = option(
        "image, projector and fuse settings: --set image.resample=bicubic projector.depth=3 fuse.grid=[16,16]",
        default=(),
        metavar="NAME=VALUE",
        repeats=True,
    )


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared
    parts: Parts
    geometry: Geometry
    from_: str | None = option(
        "go on with a whole model in another geometry (--image-size, --max-num-patches, --naflex, --layer, --projector,"
        " --encoder-kind), all other weights as they are",
        default=None,
        metavar="M",
    )
    out: Path = option("directory to make", flags=("-o",), metavar="DIR")
    seed: int = option("of the weights that are drawn", default=0, metavar="N", least=0)
    json: bool = option("print JSON", default=False)


def run(options: Options) -> int:
    """`vlm new`: what was made, as the table of `vlm info`."""
    changed = settings_of(options.geometry)
    _check(options, changed)
    console.quiet_transformers()
    from vlm.build.assembly import stored_rows
    from vlm.checkpoints.saving import save
    from vlm.exchange.publishing import check_out, published
    from vlm.measure.info import describe, table

    check_out(options.out)  # before minutes of loading
    model, processor = _changed(options, changed) if options.from_ else _new(options, changed)
    with published(options.out) as folder:
        save(model, processor, folder)
    facts = describe((model, processor))
    if options.parts.decoder:
        facts["new_vocabulary_rows"] = facts["vocabulary"] - stored_rows(options.parts.decoder)
    if options.json:
        print(jsons.dumps(facts, indent=1))
    else:
        print(table(facts))
        if not options.from_:
            print(
                f"new rows    {facts['new_vocabulary_rows']:,} of the vocabulary; {len(processor.tokenizer):,} tokens"
            )
    print(f"written to {options.out}", file=sys.stderr)
    return console.OK


def _check(options: Options, changed: dict[str, dict[str, Any]]) -> None:
    """Refuse what does not go together.

    Raises:
        ConfigError: a part of a new model beside --from, or neither a model nor its parts.
    """
    if not options.from_:
        if options.parts.encoder is None or options.parts.decoder is None:
            raise ConfigError(
                "give --encoder and --decoder, the parts of a new model, or --from, a model to go on with"
            )
        return
    parts = [f"--{name}" for name in ("encoder", "decoder", "tokenizer") if getattr(options.parts, name) is not None]
    parts += ["--set fuse"] if changed["fuse"] else []
    if parts:
        raise ConfigError(
            f"--from goes on with a whole model, which has its {', '.join(parts)} already; leave them out"
        )


def _new(options: Options, changed: dict[str, dict[str, Any]]) -> Any:
    from vlm.build.assembly import new

    assert options.parts.encoder is not None and options.parts.decoder is not None
    how = options.geometry
    return new(
        options.parts.encoder,
        {"kind": how.projector or "linear", **changed["projector"]},
        options.parts.decoder,
        options.parts.tokenizer,
        encoder_kind=how.encoder_kind or options.shared.encoder_class,
        image_size=how.image_size,
        image=changed["image"],
        layer=how.layer or [-1],
        fuse=changed["fuse"] or None,
        seed=options.seed,
    )


def _changed(options: Options, changed: dict[str, dict[str, Any]]) -> Any:
    """The model of --from in the geometry that was asked for; it stays in its number format."""
    from vlm.checkpoints.directory import load
    from vlm.checkpoints.geometry import with_geometry

    assert options.from_ is not None
    model, processor = load(options.from_)
    how = options.geometry
    projector: Any = how.projector
    if changed["projector"]:
        own = model.config.projector_config
        projector = {**(own if projector in (None, own["kind"]) else {"kind": projector}), **changed["projector"]}
    made = with_geometry(
        model,
        processor,
        image_size=how.image_size,
        image=changed["image"],
        layer=how.layer,
        projector=projector,
        encoder_kind=how.encoder_kind,
        seed=options.seed,
    )
    if made[0] is model and made[1] is processor:
        raise ConfigError(
            f"nothing would change of {options.from_}; give another --image-size, or what else is to change"
        )
    return made


def settings_of(how: Geometry) -> dict[str, dict[str, Any]]:
    """`image.resample=bicubic` as {"image": {"resample": "bicubic"}}; values are YAML.

    Raises:
        ConfigError: no `image.NAME=VALUE` or `projector.NAME=VALUE`.
    """
    result: dict[str, dict[str, Any]] = {part: {} for part in SETTABLE}
    for override in how.set:
        name, equals, value = override.partition("=")
        part, dot, key = name.strip().partition(".")
        if not (equals and dot and key) or part not in SETTABLE:
            raise ConfigError(
                f"--set {override}: expected image.NAME=VALUE, projector.NAME=VALUE or fuse.NAME=VALUE, such as"
                f" image.resample=bicubic"
            )
        result[part][key] = parse_yaml(value, where=f"--set {override}")
    if how.max_num_patches is not None:
        result["image"]["max_num_patches"] = how.max_num_patches
    if how.naflex is not None:
        result["image"]["naflex"] = how.naflex
    return result


COMMAND = Command(
    name="new",
    help="build a model, or change the geometry of one",
    details=(
        "From its parts (--encoder, --decoder), or from a whole model in another geometry (--from). Tower and decoder"
        " keep their weights bit for bit; a new projector and the rows of new tokens are drawn. A model of parts is"
        " float32 and ready for `vlm train`."
    ),
    options=Options,
    run=run,
    group="build",
)
