"""Names of the Hub as people paste them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlm.checkpoints import places
from vlm.errors import CheckpointError


@pytest.mark.parametrize(
    ("pasted", "wanted"),
    [
        ("google/siglip2-base-patch16-224", ("google/siglip2-base-patch16-224", None)),
        ("https://huggingface.co/google/siglip2-base-patch16-224", ("google/siglip2-base-patch16-224", None)),
        ("huggingface.co/google/siglip2-base-patch16-224/", ("google/siglip2-base-patch16-224", None)),
        ("https://hf.co/google/siglip-large-patch16-384", ("google/siglip-large-patch16-384", None)),
        ("https://huggingface.co/google/medsiglip-448/tree/main", ("google/medsiglip-448", "main")),
        ("https://huggingface.co/a/b.c_d/blob/v1.0/config.json?download=true", ("a/b.c_d", "v1.0")),
        ("hf-hub:timm/ViT-SO400M-14-SigLIP-384", ("timm/ViT-SO400M-14-SigLIP-384", None)),
        ("hf://google/siglip2-base-patch16-224@refs", ("google/siglip2-base-patch16-224", "refs")),
        (" google/siglip2-base-patch16-224 ", ("google/siglip2-base-patch16-224", None)),
        ("https://example.com/a/b", ("https://example.com/a/b", None)),
    ],
)
def test_what_is_pasted(pasted: str, wanted: tuple[str, str | None]) -> None:
    assert places.hub_id(pasted) == wanted


def test_they_are_what_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr(places, "snapshot_download", download)
    # As a Path has it too, which runs slashes together.
    for pasted in ("https://huggingface.co/a/b/tree/dev", Path("https://huggingface.co/a/b")):
        assert places.locate(pasted) == tmp_path
    assert places.locate("https://huggingface.co/a/b/tree/dev", revision="main") == tmp_path
    assert asked == [("a/b", "dev"), ("a/b", None), ("a/b", "main")]


def test_other_addresses_are_refused() -> None:
    with pytest.raises(CheckpointError, match="not a hub id"):
        places.locate("https://example.com/a/b")
