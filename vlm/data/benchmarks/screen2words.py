"""Screen2Words: `screen_summaries.csv` and the lists of screens `split/{split}_screens.txt`.

The table has the columns `screenId` and `summary`, about five rows a screen; a list has one screen a line. Images are
RICO's `combined/{screenId}.jpg` (github google-research-datasets/screen2words; big_vision `datasets/screen2words`).

Files: `summaries`, `screens`, and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm.data.benchmarks.contract import Benchmark
from vlm.data.items import Item
from vlm.data.source import Source
from vlm.errors import DataError

FORMAT = Benchmark(about="Screen2Words: a table of screenId and summary, and lists of screens")


def read(source: Source) -> Iterator[Item]:
    summaries: dict[str, list[str]] = {}
    for row in source.table("summaries", "screenId", "summary"):
        summaries.setdefault(row["screenId"], []).append(row["summary"])
    folder = source.images()
    for screen in source.text("screens").split():
        if screen not in summaries:
            raise DataError(f"{source.place('summaries')}: no summary of screen {screen}")
        yield Item(id=screen, images=(folder / f"{screen}.jpg",), references=tuple(summaries[screen]))
