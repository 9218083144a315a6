"""NLVR2: `dev.json` and `test1.json` (the public test set), one object per line.

`{"identifier": "test1-0-1-0", "sentence", "label" (True or False, as text), "left_url", "right_url", ...}`; the images
of `split-set-pair-sentence` are `split-set-pair-img0.png` (left) and `...-img1.png` (github lil-lab/nlvr,
nlvr2/README).

Files: `sentences`, and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from vlm.data.benchmarks.contract import Benchmark, Predictions, each
from vlm.data.items import Item, Shown
from vlm.data.source import Folder, Source

FORMAT = Benchmark(
    about='NLVR2: JSONL of {"identifier", "sentence", "label"}',
    gold="sentences",
    recognise=each("identifier", "sentence", "label"),
    predictions=(
        Predictions(
            name="nlvr2",
            about='NLVR2: list or JSONL of {"identifier", "prediction"}',
            id="identifier",
            text="prediction",
            order=6,
        ),
    ),
    order=8,
)


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    for row in source.records("sentences"):
        label = row.one_of("label", "True", "False")
        sentence = row.text("sentence")
        yield Item(
            id=row.key("identifier"),
            answers=(label,),
            info={"label": label, "sentence": sentence},
            show=partial(_show, folder, row.key("identifier"), sentence),
        )


def _show(folder: Folder, key: str, sentence: str) -> Shown:
    pair = key.rsplit("-", 1)[0]
    return Shown(images=(folder / f"{pair}-img0.png", folder / f"{pair}-img1.png"), fields={"sentence": sentence})
