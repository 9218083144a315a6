"""`vlm compare`: which vision tower, and which projector?"""

import json as jsons
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlm.cli import console
from vlm.cli.options import Command, Shared
from vlm.settings import option


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared
    config: Path = option("the comparison, as YAML", flags=("-c",), metavar="FILE")
    encoders: list[str] = option("names in FILE, checkpoints or hub ids", default=(), metavar="A", shown="all of FILE")
    projectors: list[str] = option("names in FILE or kinds", default=(), metavar="P", shown="all of FILE")
    seeds: list[int] = option("of the runs", default=(), metavar="N", least=0, shown="those of FILE")
    out: Path = option("folder for runs and results", flags=("-o",), metavar="DIR")
    match: Literal["tokens", "resolution", "none"] = option(
        "what is made equal between towers, as far as their patches allow", default="tokens"
    )
    jobs: int | None = option(
        "runs at once", default=None, flags=("-j",), metavar="N", least=1, shown="one per GPU, or 1"
    )
    set: list[str] = option(
        "change settings: --set run.stages.0.steps=100", default=(), metavar="NAME=VALUE", repeats=True
    )
    plan: bool = option("show what would be run, and stop", default=False)
    json: bool = option("print comparison.json", default=False)


def run(options: Options) -> int:
    """The tables on stdout, progress on stderr."""
    from vlm.compare.config import load_config

    config = load_config(options.config, list(options.set))
    chosen: dict[str, Any] = {
        "encoders": list(options.encoders),
        "projectors": list(options.projectors),
        "seeds": list(options.seeds),
        "how": options.match,
    }
    from vlm.compare import comparison

    console.quiet_transformers()
    if options.plan:
        return _plan(comparison.plan(config, **chosen))
    encoder_class = options.shared.encoder_class
    result = comparison.compare(config, options.out, **chosen, jobs=options.jobs, encoder_class=encoder_class)
    from vlm.compare.table import text

    print(jsons.dumps(result, indent=1) if options.json else text(result))
    print(f"report: {options.out / 'report.html'}", file=sys.stderr)
    whole = result["all_held"] and not result["failed"] and not result["skipped_items"]
    return console.OK if whole and not result["failed_training_images"] else console.SKIPPED


def _plan(plan: Any) -> int:
    from vlm.compare.match import table

    print(table(plan.arms, plan.how))
    print(f"{len(plan.arms) * len(plan.seeds)} runs: seeds {', '.join(map(str, plan.seeds))}")
    return console.OK


COMMAND = Command(
    name="compare",
    help="find out which vision tower is best for a model",
    details=(
        "Trains the same run once per tower, projector and seed, and measures quality, cost and the towers alone."
        " Run again with the same options, it goes on where it stopped. Exit code 3: a run failed, images could not be"
        " decoded, or something was not held fixed."
    ),
    options=Options,
    run=run,
    group="train",
)
