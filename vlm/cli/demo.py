"""`vlm demo`: a model of a small drawn world."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from vlm.cli import console
from vlm.cli.options import at_least, command

DETAILS = (
    "Draws scenes, trains in two stages, scores the model on scenes it has never seen and shows its captions: minutes"
    " on two cores. Run again with the same options, it goes on where it stopped."
)


def add(commands: Any) -> None:
    """The options of `vlm demo`."""
    parser = command(commands, run, "demo", "train a model on a small drawn world", DETAILS)
    parser.add_argument("--out", "-o", type=Path, default=Path("demo"), metavar="DIR", help="folder (demo)")
    parser.add_argument("--from-scratch", action="store_true", help="pretrain the start checkpoints first; longer")
    parser.add_argument("--pretrain", action="store_true", help="only make the start checkpoints the package ships")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of data, weights and training (0)")
    parser.add_argument(
        "--task",
        choices=("scenes", "text"),
        default="scenes",
        help="text: read numbers on strips of every shape, at a fixed resolution and as NaFlex (scenes)",
    )
    _tower(parser)
    parser.add_argument(
        "--prepare", type=Path, metavar="DIR", help="only write data, towers and a compare.yaml for `vlm compare`"
    )
    parser.add_argument(
        "--encoders", nargs="+", metavar="KIND", help="of --prepare (siglip siglip2_naflex clip dinov2)"
    )


def _tower(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--encoder",
        default="siglip",
        metavar="NAME",
        help="the tower: siglip (the package's), siglip2_naflex (the same weights), another kind (NEW weights), or a"
        " checkpoint (siglip)",
    )
    parser.add_argument(
        "--pretrain-encoder", action="store_true", help="first pretrain a tower of that kind as the package's was"
    )
    parser.add_argument(
        "--pretrain-steps",
        type=at_least(0),
        metavar="N",
        help="of each pretraining; 0: new weights (2000; with --prepare 450)",
    )


def run(options: Namespace) -> int:
    """The demo prints its figures itself."""
    _check(options)
    if options.prepare is not None:
        return _prepare(options)
    if options.task == "text":
        return _read(options)
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


def _check(options: Namespace) -> None:
    """Refuse options that would change nothing."""
    from vlm.errors import ConfigError

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
    if given and (options.prepare is not None or options.task == "text"):
        other = "--prepare" if options.prepare is not None else "--task text"
        raise ConfigError(f"{', '.join(given)}: {other} chooses its own towers; leave it out")
    if options.prepare is not None and options.task == "text":
        raise ConfigError("--prepare is for --task scenes; leave one of the two out")
    if options.pretrain_steps is not None and not (options.prepare or options.pretrain_encoder or _pretrains(options)):
        raise ConfigError("--pretrain-steps: nothing is pretrained; add --pretrain-encoder, or leave it out")


def _pretrains(options: Namespace) -> bool:
    return bool(options.pretrain or options.from_scratch)


def _read(options: Namespace) -> int:
    """The table on stdout."""
    from vlm.demo import reading
    from vlm.train.run import run as train

    console.quiet_transformers()
    reading.main(options.out, seed=options.seed, train=train)
    return console.OK


def _prepare(options: Namespace) -> int:
    """The comparison's file on stdout."""
    from vlm.demo.prepare import ENCODERS, prepare

    console.quiet_transformers()
    encoders = options.encoders or ENCODERS
    print(prepare(options.prepare, encoders, seed=options.seed, steps=options.pretrain_steps))
    return console.OK
