"""The project's own annotations (`vlm.data`): image, prefix, references, answers, suffix, id.

The prompt template gets the field `prefix`; with the template `{prefix}` the model is asked exactly what the file says.

Files: `data`, and the folder `images` if the images do not lie below the file's own.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm.data import reading
from vlm.data.source import Item, Source


def read(source: Source) -> Iterator[Item]:
    images = source.path("images") if source.has("images") else None
    examples, _ = reading.read(source.path("data"), image_root=images, require=())
    for example in examples:
        yield Item(
            id=example.id,
            images=example.images,
            fields={"prefix": example.prefix},
            suffix=example.suffix,
            references=example.references,
            answers=example.answers,
            info=example.info,
        )
