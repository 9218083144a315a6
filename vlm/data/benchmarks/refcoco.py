"""RefCOCO, RefCOCO+, RefCOCOg: `refs(unc).json` and `instances.json`.

The official `refs(unc).p` (`refs(umd).p` for RefCOCOg) is a pickle, which can run code when it is opened, so it is
never opened here. Convert it once, if you trust where you got it:

    python -c "import json, pickle; json.dump(pickle.load(open('refs(unc).p', 'rb')), open('refs(unc).json', 'w'))"

The result is a list of `{"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent_id", "sent", ...}], ...}`;
`instances.json` is COCO's `{"images": [{"id", "file_name", "height", "width"}], "annotations": [{"id", "bbox" (x, y,
width, height in pixels)}]}` (github lichengunc/refer; big_vision `datasets/refcoco`). One item per sentence. `box` is
(x1, y1, x2, y2) in pixels; the gold text is that box as PaliGemma writes it: `<locY1><locX1><locY2><locX2>`.

Files: `refs`, `instances`, and the folder `images`. Options: `split`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm.data.benchmarks.contract import Benchmark
from vlm.data.items import Item
from vlm.data.source import Source
from vlm.errors import DataError
from vlm.text.locations import box_to_loc

FORMAT = Benchmark(about='RefCOCO: a list of {"ann_id", "sentences"}, and COCO\'s instances.json')


def read(source: Source) -> Iterator[Item]:
    _refuse_pickle(source)
    instances = source.object("instances")
    boxes = {row.integer("id"): row.box("bbox") for row in instances.rows("annotations")}
    images = {row.integer("id"): row for row in instances.rows("images")}
    folder = source.images()
    for ref in source.records("refs"):
        if ref.text("split") != source.option("split"):
            continue
        annotation, image = ref.integer("ann_id"), ref.integer("image_id")
        if annotation not in boxes or image not in images:
            raise DataError(f"{ref.where}: its object or image is not in {source.files['instances'].path}")
        row = images[image]
        width, height = row.integer("width"), row.integer("height")
        x, y, wide, high = boxes[annotation]
        box = (x, y, x + wide, y + high)
        for sentence in ref.rows("sentences"):
            expression = sentence.text("sent")
            yield Item(
                id=sentence.key("sent_id"),
                images=(folder / row.text("file_name"),),
                fields={"expression": expression},
                answers=(box_to_loc(box, width, height),),
                info={"box": box, "image_size": (width, height)},
            )


def _refuse_pickle(source: Source) -> None:
    refs = source.root / source.files["refs"].path
    pickled = refs.with_suffix(".p")
    if not refs.exists() and pickled.exists():
        raise DataError(
            f"{pickled} is a pickle, which can run code when it is opened; convert it once, if you trust it: python -c"
            f" \"import json, pickle; json.dump(pickle.load(open('{pickled}', 'rb')), open('{refs}', 'w'))\""
        )
