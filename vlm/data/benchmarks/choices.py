"""Multiple choice with letters, as JSON lines: for MMMU-style sets of one's own.

`{"id", "question", "options": [...], "answer": "B", "images": ["a.png", ...]}`, one object per line, images below the
folder `images`. Further text keys (`subject`, `topic`, ...) can be used for breakdowns.

Files: `questions`, and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm.data.benchmarks.contract import Benchmark
from vlm.data.items import Item, lettered
from vlm.data.source import Source

_OWN = ("id", "question", "options", "answer", "images")

FORMAT = Benchmark(about='JSONL of {"id", "question", "options", "answer" (a letter), "images"}')


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    for row in source.records("questions"):
        item = Item(
            id=row.key("id"),
            images=tuple(folder / name for name in row.texts("images")),
            fields={"question": row.text("question")},
            info={key: value for key, value in row.values.items() if isinstance(value, str) and key not in _OWN},
        )
        yield lettered(item, row.texts("options"), row.text("answer"), row.where)
