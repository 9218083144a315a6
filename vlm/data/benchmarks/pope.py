"""POPE: `coco_pope_{random,popular,adversarial}.json`, one object per line.

`{"question_id", "image" (COCO_val2014_....jpg), "text", "label" (yes or no)}` (RUCAIBox/POPE, output/coco; big_vision
`datasets/pope`). Question ids count from 1 in each of the three files.

Files: one per kind of question (`random`, `popular`, `adversarial`), and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm.data.source import Item, Source
from vlm.errors import DataError


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    for split in source.files:
        if split == "images":
            continue
        for row in source.lines(split):
            label = row.text("label")
            if label not in ("yes", "no"):
                raise DataError(f"{row.where}: 'label' should be yes or no, got {label!r}")
            yield Item(
                id=f"{split}-{row.key('question_id')}",
                images=(folder / row.text("image"),),
                fields={"question": row.text("text")},
                answers=(label,),
                info={"split": split, "label": label},
            )
