"""`vlm compare`: which vision tower, and which projector?"""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from vlm.cli import console
from vlm.cli.options import add_overrides, at_least, command

DETAILS = (
    "Trains the same run once per tower, projector and seed, and measures quality, cost and the towers alone."
    " Run again with the same options, it goes on where it stopped. Exit code 3: a run failed, images could not be"
    " decoded, or something was not held fixed."
)


def add(commands: Any) -> None:
    """The options of `vlm compare`."""
    parser = command(commands, run, "compare", "find out which vision tower is best for a model", DETAILS)
    parser.add_argument("--config", "-c", type=Path, required=True, metavar="FILE", help="the comparison, as YAML")
    parser.add_argument(
        "--encoders", nargs="+", default=[], metavar="A", help="names in FILE, checkpoints or hub ids (all of FILE)"
    )
    parser.add_argument("--projectors", nargs="+", default=[], metavar="P", help="names in FILE or kinds (all of FILE)")
    parser.add_argument("--seeds", nargs="+", type=at_least(0), default=[], metavar="N", help="(those of FILE)")
    parser.add_argument("--out", "-o", type=Path, required=True, metavar="DIR", help="folder for runs and results")
    parser.add_argument(
        "--match",
        choices=("tokens", "resolution", "none"),
        default="tokens",
        help="what is made equal between towers, as far as their patches allow (tokens)",
    )
    parser.add_argument("--jobs", "-j", type=at_least(1), metavar="N", help="runs at once (one per GPU, or 1)")
    add_overrides(
        parser,
        "change settings: --set run.stages.0.steps=100",
    )
    parser.add_argument("--plan", action="store_true", help="show what would be run, and stop")
    parser.add_argument("--json", action="store_true", help="print comparison.json")


def run(options: Namespace) -> int:
    """The tables on stdout, progress on stderr."""
    from vlm.compare.config import load_config

    config = load_config(options.config, options.overrides)
    chosen = {
        "encoders": options.encoders,
        "projectors": options.projectors,
        "seeds": options.seeds,
        "how": options.match,
    }
    from vlm import compare

    console.quiet_transformers()
    if options.plan:
        return _plan(compare.plan(config, **chosen))
    result = compare.compare(config, options.out, **chosen, jobs=options.jobs, encoder_class=options.encoder_class)
    from vlm.compare.table import text

    print(json.dumps(result, indent=1) if options.json else text(result))
    print(f"report: {options.out / 'report.html'}", file=sys.stderr)
    whole = result["all_held"] and not result["failed"] and not result["skipped_items"]
    return console.OK if whole and not result["failed_training_images"] else console.SKIPPED


def _plan(plan: Any) -> int:
    from vlm.compare.match import table

    print(table(plan.arms, plan.how))
    print(f"{len(plan.arms) * len(plan.seeds)} runs: seeds {', '.join(map(str, plan.seeds))}")
    return console.OK
