"""NLVR2: `dev.json` and `test1.json` (the public test set), one object per line.

`{"identifier": "test1-0-1-0", "sentence", "label" (True or False, as text), "left_url", "right_url", ...}`; the images
of `split-set-pair-sentence` are `split-set-pair-img0.png` (left) and `...-img1.png` (github lil-lab/nlvr,
nlvr2/README).

Files: `sentences`, and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm.data.source import Item, Source
from vlm.errors import DataError


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    for row in source.lines("sentences"):
        key, label = row.text("identifier"), row.text("label")
        if label not in ("True", "False"):
            raise DataError(f"{row.where}: 'label' should be True or False as text, got {label!r}")
        pair, sentence = key.rsplit("-", 1)[0], row.text("sentence")
        yield Item(
            id=key,
            images=(folder / f"{pair}-img0.png", folder / f"{pair}-img1.png"),
            fields={"sentence": sentence},
            answers=(label,),
            info={"label": label, "sentence": sentence},
        )
