"""`vlm train`: a run in stages, from one YAML file."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from vlm.cli import console
from vlm.cli.options import Command, Shared
from vlm.errors import ConfigError
from vlm.settings import option


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared
    config: Path = option("the run, as YAML", flags=("-c",), metavar="FILE")
    set: list[str] = option(
        "change settings: --set seed=1 stages.0.steps=100", default=(), metavar="NAME=VALUE", repeats=True
    )
    resume: bool = option("go on after the newest complete checkpoint", default=False)
    accept_changes: bool = option(
        "with --resume: go on although settings or data that change the result are others now; it is recorded",
        default=False,
    )
    skip_bad: bool = option("skip and list broken annotations", default=False)
    print_config: bool = option("print the whole configuration and stop", default=False)


def run(options: Options) -> int:
    """`vlm train`: the final model's directory on stdout."""
    from vlm import settings
    from vlm.train.config import load_config
    from vlm.train.history import trained
    from vlm.train.run import run as train
    from vlm.train.signals import Stopped

    if options.accept_changes and not options.resume:
        raise ConfigError("--accept-changes is about a run that goes on; add --resume")
    config = load_config(options.config, options.set)
    if options.print_config:
        import yaml

        print(yaml.safe_dump(settings.to_dict(config), sort_keys=False), end="")
        return console.OK
    try:
        print(train(config, resume=options.resume, skip_bad=options.skip_bad, accept_changes=options.accept_changes))
    except Stopped:
        if trained(config.out):
            print(f"to go on: {console.again('--resume', without='--accept-changes')}", file=sys.stderr)
        raise
    summary = json.loads((config.out / "summary.json").read_text(encoding="utf-8"))
    return console.SKIPPED if summary["skipped_annotations"] or summary["failed_images"] else console.OK


COMMAND = Command(name="train", help="train a model in stages", options=Options, run=run, group="train")
