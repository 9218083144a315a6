"""What a processor is given, with one entry for each sample."""

from __future__ import annotations

from typing import Any

from vlm.errors import DataError
from vlm.images.load import ImageInput, is_image


def image_groups(images: Any, num_samples: int) -> list[list[ImageInput]]:
    """The images of each sample, from what a batch may be given. Raises `DataError` for a None among several."""
    if images is None:
        return [[] for _ in range(num_samples)]
    if is_image(images):
        images = [images]
    groups = [[] if item is None else list(item) if isinstance(item, list | tuple) else [item] for item in images]
    for number, group in enumerate(groups):
        if any(image is None for image in group):
            raise DataError(f"sample {number}: one of its images is None; leave it out, or give [] for text alone")
    return groups


def check_lengths(prefixes: list[str], suffixes: list[str] | None, names: list[str], groups: list[Any]) -> None:
    """Refuse an empty batch, and one that has not one prefix, suffix (if any), id and list of images for each sample.

    Raises:
        DataError: says how many there are of each.
    """
    if not prefixes:
        raise DataError("the batch is empty: no text was given; pass at least one prefix (it may be the empty string)")
    counts = {"text": len(prefixes), "ids": len(names), "images": len(groups)}
    if suffixes is not None:
        counts["suffix"] = len(suffixes)
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise DataError(f"each sample needs one of each, got {shown} (first sample: {names[:1]})")
    for name, suffix in zip(names, suffixes or [], strict=False):
        if suffix is None:
            raise DataError(
                f'sample {name!r}: the suffix is None in a training batch; give each sample a target, or "" where'
                " there is nothing to say"
            )
