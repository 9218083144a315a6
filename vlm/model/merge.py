"""Image tokens in the place of their placeholders."""

from __future__ import annotations

from torch import Tensor

from vlm.errors import DataError


def merge(embeds: Tensor, placeholders: Tensor, tokens: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Put image tokens where their placeholders are.

    Args:
        embeds: float[B, S, D]. placeholders: bool[B, S].
        tokens: float[T, D], of all images one after the other. counts: int64[M], tokens of each image.

    Returns:
        (float[B, S, D], float[T, D]): the embeddings, and the image tokens as they entered them.

    Raises:
        DataError: a sample has another number of placeholders than its images have tokens.
    """
    # `masked_scatter` fills the placeholders row by row with the tokens in their order. It knows neither samples nor
    # images and drops what is too much in silence: counted first, so that no image runs on into the next sample.
    images_per_sample(placeholders, counts)
    tokens = tokens.to(embeds)  # a tower may be in another dtype, or on another device
    return embeds.masked_scatter(placeholders[..., None], tokens), tokens


def refuse_placeholders(placeholders: Tensor) -> None:
    """Raise `DataError` where a batch without images has placeholders, bool[B, S]."""
    if bool(placeholders.any()):
        raise DataError(
            f"{int(placeholders.sum())} image placeholders but no pixel_values; pass the processor's whole"
            f" batch: model(**batch)"
        )


def images_per_sample(placeholders: Tensor, counts: Tensor) -> list[list[int]]:
    """Which images belong to which sample: each must have exactly as many placeholders as its images have tokens.

    Args:
        placeholders: bool[B, S].
        counts: int64[M], tokens of each image, in order.

    Returns:
        for each sample the indices of its images.

    Raises:
        DataError: names the first sample that differs, with both numbers.
    """
    tokens = counts.tolist()
    groups: list[list[int]] = []
    image = 0
    for sample, wanted in enumerate(placeholders.sum(1).tolist()):
        group: list[int] = []
        while sum(tokens[i] for i in group) < wanted and image < len(tokens):
            group.append(image)
            image += 1
        have = sum(tokens[i] for i in group)
        if have != wanted:
            raise DataError(
                f"sample {sample} of the batch has {wanted} image placeholders, but its images give {have} tokens;"
                f" placeholders are written by the"
                " processor only, and its image_transform must be the tower's"
            )
        groups.append(group)
    if image != len(tokens):
        raise DataError(
            f"{len(tokens)} images, but the placeholders of the batch take only the first {image}; one image list per"
            f" sample"
        )
    return groups
