"""`vlm demo`: a model of a small drawn world."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlm.cli import console
from vlm.cli.options import Command, Shared
from vlm.errors import ConfigError
from vlm.settings import option


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared
    out: Path = option("folder", default=Path("demo"), flags=("-o",), metavar="DIR")
    from_scratch: bool = option("pretrain the start checkpoints first; longer", default=False)
    pretrain: bool = option("only make the start checkpoints the package ships", default=False)
    seed: int = option("of data, weights and training", default=0, metavar="N", least=0)
    task: Literal["scenes", "text", "search"] = option(
        "text: read numbers on strips of every shape, at a fixed resolution and as NaFlex; search: draw 300 scenes,"
        " classify, embed and search them with the package's SigLIP",
        default="scenes",
    )
    encoder: str = option(
        "the tower: siglip (the package's), siglip2_naflex (the same weights), another kind (NEW weights), or a"
        " checkpoint",
        default="siglip",
        metavar="NAME",
    )
    pretrain_encoder: bool = option("first pretrain a tower of that kind as the package's was", default=False)
    pretrain_steps: int | None = option(
        "of each pretraining; 0: new weights", default=None, metavar="N", least=0, shown="2000; with --prepare 450"
    )
    prepare: Path | None = option(
        "only write data, towers and a compare.yaml for `vlm compare`", default=None, metavar="DIR"
    )
    encoders: list[str] | None = option(
        "of --prepare", default=None, metavar="KIND", shown="siglip siglip2_naflex clip dinov2"
    )


def run(options: Options) -> int:
    """The demo prints its figures itself."""
    _check(options)
    if options.prepare is not None:
        return _prepare(options)
    if options.task == "text":
        return _read(options)
    if options.task == "search":
        return _search(options)
    from vlm.demo.recipe import Size
    from vlm.demo.run import main
    from vlm.train.run import run as train

    main(
        options.out,
        from_scratch=options.from_scratch,
        pretrain=options.pretrain,
        encoder=options.encoder,
        pretrain_encoder=options.pretrain_encoder,
        seed=options.seed,
        size=Size(pretrain_steps=options.pretrain_steps),
        train=train,
    )
    return console.OK


def _check(options: Options) -> None:
    """Refuse options that would change nothing."""
    if options.encoders is not None and options.prepare is None:
        raise ConfigError("--encoders names the towers of --prepare DIR; for one demo give --encoder NAME")
    one = {
        "--encoder": options.encoder != "siglip",
        "--pretrain-encoder": options.pretrain_encoder,
        "--pretrain": options.pretrain,
        "--from-scratch": options.from_scratch,
        "--pretrain-steps": options.pretrain_steps is not None and options.prepare is None,
    }
    given = [name for name, there in one.items() if there]
    if given and (options.prepare is not None or options.task != "scenes"):
        other = "--prepare" if options.prepare is not None else f"--task {options.task}"
        raise ConfigError(f"{', '.join(given)}: {other} chooses its own towers; leave it out")
    if options.prepare is not None and options.task != "scenes":
        raise ConfigError("--prepare is for --task scenes; leave one of the two out")
    if options.pretrain_steps is not None and not (options.prepare or options.pretrain_encoder or _pretrains(options)):
        raise ConfigError("--pretrain-steps: nothing is pretrained; add --pretrain-encoder, or leave it out")


def _pretrains(options: Options) -> bool:
    return bool(options.pretrain or options.from_scratch)


def _read(options: Options) -> int:
    """The table on stdout."""
    from vlm.demo import reading
    from vlm.train.run import run as train

    console.quiet_transformers()
    reading.main(options.out, seed=options.seed, train=train)
    return console.OK


def _search(options: Options) -> int:
    """The figures on stdout."""
    from vlm.demo import search

    console.quiet_transformers()
    search.main(options.out, seed=options.seed)
    return console.OK


def _prepare(options: Options) -> int:
    """The comparison's file on stdout."""
    from vlm.demo.prepare import ENCODERS, prepare

    console.quiet_transformers()
    encoders = options.encoders or ENCODERS
    assert options.prepare is not None
    print(prepare(options.prepare, encoders, seed=options.seed, steps=options.pretrain_steps))
    return console.OK


COMMAND = Command(
    name="demo",
    help="train a model on a small drawn world",
    details=(
        "Draws scenes, trains in two stages, scores the model on scenes it has never seen and shows its captions:"
        " minutes on two cores. Run again with the same options, it goes on where it stopped."
    ),
    options=Options,
    run=run,
    group="train",
)
