"""`vlm eval diff`: two results of `vlm eval`, item by item."""

import json as jsons
from dataclasses import dataclass
from pathlib import Path

from vlm.cli import console
from vlm.cli.options import Command, Shared
from vlm.settings import option


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared
    a: Path = option("folder of results", place=True, metavar="A")
    b: Path = option("folder of results, of the same items", place=True, metavar="B")
    html: Path | None = option("write a page with the items that changed", default=None, metavar="FILE")
    json: bool = option("print JSON, with all items that changed", default=False)


def run(options: Options) -> int:
    """A table of differences on stdout."""
    from vlm.eval import diff

    found = {label: diff.compare(*folders) for label, folders in diff.pairs(options.a, options.b).items()}
    if options.html:
        diff.write_page(options.html, found)
    if options.json:
        print(jsons.dumps(found if len(found) > 1 else next(iter(found.values())), indent=1))
    else:
        print("\n\n".join(diff.table(one) for one in found.values()))
    return console.OK


COMMAND = Command(
    name="eval diff",
    help="compare two results item by item",
    details=(
        "A and B are folders that `vlm eval` has written about the same items, or about the same tasks; the difference"
        " is B minus A."
    ),
    options=Options,
    run=run,
    group="judge",
)
