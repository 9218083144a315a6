"""COCO-35L: `coco_mt_dev.jsonl`, machine translations of COCO captions into 34 languages.

One object per line: `{"image_id": "IMAGE_CAPTION", "caption_tokenized", "trg_lang", "translation_tokenized"}`; the
English captions are the sources of one target language (German, as in big_vision `datasets/coco35l`). Where an image
lies is looked up in Karpathy's `dataset_coco.json` (`cocoid`, `filepath`, `filename`).

Files: `captions`, `karpathy`, and the folder `images` (with train2014 and val2014 in it). Options: `languages`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm.data.benchmarks.contract import Benchmark
from vlm.data.items import Item
from vlm.data.source import Source
from vlm.errors import DataError

_SOURCE_OF_ENGLISH = "de"

FORMAT = Benchmark(about='COCO-35L: JSONL of {"image_id", "trg_lang", "caption_tokenized", "translation_tokenized"}')


def read(source: Source) -> Iterator[Item]:
    captions: dict[tuple[str, str], list[str]] = {}
    for row in source.records("captions"):
        image, language = row.key("image_id").split("_")[0], row.text("trg_lang")
        captions.setdefault((language, image), []).append(row.text("translation_tokenized"))
        if language == _SOURCE_OF_ENGLISH:
            captions.setdefault(("en", image), []).append(row.text("caption_tokenized"))
    rows = source.object("karpathy").rows("images")
    files = {row.key("cocoid"): f"{row.text('filepath')}/{row.text('filename')}" for row in rows}
    folder = source.images()
    wanted = set(source.option("languages"))
    for (language, image), texts in sorted(captions.items()):
        if language not in wanted:
            continue
        if image not in files:
            raise DataError(f"{source.files['captions'].path}: image {image} is not in Karpathy's file")
        yield Item(
            id=f"{image}_{language}",
            images=(folder / files[image],),
            fields={"language": language},
            references=tuple(texts),
            info={"language": language},
        )
