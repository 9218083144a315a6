"""Embeddings of whole collections: threads decode ahead, bad images are told, nothing is lost or moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import picture
from test_zero_shot import CLASSES, write

from vlm.errors import ConfigError
from vlm.siglip import encode_images, encode_texts, load


@pytest.mark.parametrize("kind", ["siglip", "siglip2_naflex"])
def test_images_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs = write(tmp_path, kind)
    model, processor = load(tmp_path)
    images = {str(i): picture(i, size) for i, size in enumerate([(28, 28), (60, 20), (20, 70), (33, 44), (50, 50)])}
    (tmp_path / "bad.png").write_bytes(b"no picture")
    sources: list[tuple[str, Any]] = [("bad", tmp_path / "bad.png"), *images.items(), ("gone", tmp_path / "gone.png")]
    found = list(encode_images(model, processor, iter(sources), batch_size=3, decoders=2))
    assert [batch.keys for batch in found] == [["0", "1"], ["2", "3", "4"], []]
    assert [[(key, error.code) for key, error in batch.bad] for batch in found] == [
        [("bad", "not-an-image")],
        [],
        [("gone", "missing")],
    ]
    vectors = torch.cat([batch.vectors for batch in found])
    with torch.no_grad():
        each = [theirs.get_image_features(**processor.images([image])).pooler_output for image in images.values()]
    wanted = torch.nn.functional.normalize(torch.cat(each), dim=-1)
    assert vectors.dtype == torch.float32 and (vectors - wanted).abs().max() < 1e-5


def test_texts_are_those_of_transformers(tmp_path: Path) -> None:
    theirs = write(tmp_path, "siglip")
    model, processor = load(tmp_path)
    texts = [*CLASSES, "red cat " * 20]
    vectors, cut = encode_texts(model, processor, texts, batch_size=3)
    with torch.no_grad():
        wanted = theirs.get_text_features(processor.texts(texts).input_ids).pooler_output
    assert (vectors - torch.nn.functional.normalize(wanted, dim=-1)).abs().max() < 1e-5
    assert cut == (3,)
    assert encode_texts(model, processor, []).vectors.shape == (0, model.embedding_size)


def test_a_text_of_another_length_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "siglip")
    model, processor = load(tmp_path)
    ids = processor.texts(["red cat"]).input_ids
    with pytest.raises(ConfigError, match="padded to the whole context"):
        model.encode_text(ids[:, :5])


def test_the_source_of_images_is_read_no_further_than_needed(tmp_path: Path) -> None:
    write(tmp_path, "siglip")
    model, processor = load(tmp_path)
    asked = []

    def endless() -> Any:
        number = 0
        while True:
            asked.append(number)
            yield number, picture(number % 3)
            number += 1

    batches = encode_images(model, processor, endless(), batch_size=4, decoders=2)
    assert next(batches).keys == [0, 1, 2, 3] and next(batches).keys == [4, 5, 6, 7]
    del batches
    assert len(asked) <= 4 * 4
