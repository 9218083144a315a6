"""`vlm info`: what a model is made of."""

import json as jsons
from dataclasses import dataclass

from vlm.cli import console
from vlm.cli.options import Command, Shared
from vlm.settings import option


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared
    model: str = option("model directory or hub id", place=True, metavar="MODEL")
    json: bool = option("print JSON", default=False)


def run(options: Options) -> int:
    """`vlm info`: a table on stdout."""
    from vlm.measure.info import describe, table

    console.quiet_transformers()
    facts = describe(options.model)
    print(jsons.dumps(facts, indent=1) if options.json else table(facts))
    return console.OK


COMMAND = Command(
    name="info", help="show the parts of a model, their sizes and costs", options=Options, run=run, group="judge"
)
