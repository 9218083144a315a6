"""What a vision tower gives for images, and what a probe of it found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlm.errors import ConfigError, DataError
from vlm.model.modes import in_mode
from vlm.siglip.reading import on, read_ahead
from vlm.words import lines

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vlm.encoders.contract import EncoderOutput
    from vlm.images.transforms import ImageTransform

_LISTED = 50


@dataclass(frozen=True)
class ProbeResult:
    """How well a classifier on top of a tower did.

    Attributes:
        accuracy: share of the test images whose class was found, 0 to 1.
        per_item: id of each test image -> whether its class was found, in order.
        num_train, num_test: images.
        num_classes: classes that could be answered.
        settings: what else decides the number, as JSON values.
    """

    accuracy: float
    per_item: dict[str, bool]
    num_train: int
    num_test: int
    num_classes: int
    settings: dict[str, Any] = field(default_factory=dict)


def features(
    encoder: nn.Module,
    transform: ImageTransform,
    images: Sequence[Path | Image.Image],
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> Tensor:
    """One vector per image: the mean over its real patches.

    Args:
        encoder: a tower of `vlm.encoders`. It runs in eval mode without gradients; afterwards each of its modules is in
            the mode it was in.
        transform: how images become its input.
        device: where it runs; it is moved there, and back. None: where it is.

    Returns:
        float32[len(images), E], on the CPU.

    Raises:
        DataError: images that cannot be used, all of them listed, or a tower that gives NaN or infinity.
    """
    return over_images(encoder, transform, images, mean_of_patches, batch_size=batch_size, device=device)


def mean_of_patches(output: EncoderOutput) -> Tensor:
    """The mean over real patches, float32[M, E]."""
    values = output.features.float()
    if output.mask is None:
        return values.mean(1)
    mask = output.mask[..., None]
    return values.masked_fill(~mask, 0).sum(1) / mask.sum(1)


def over_images(
    encoder: nn.Module,
    transform: ImageTransform,
    images: Sequence[Path | Image.Image],
    read: Callable[[EncoderOutput], Tensor],
    *,
    batch_size: int,
    device: torch.device | str | None,
) -> Tensor:
    """`read(output)` of all images, one batch after the other, as float32 on the CPU. Raises as `features`."""
    import torch

    if batch_size < 1 or not images:
        raise ConfigError(f"batch_size is {batch_size} for {len(images)} images; both must be at least 1")
    rows: list[Tensor] = []
    problems: list[str] = []
    numbered = enumerate(images)
    with torch.no_grad(), _in_eval_mode(encoder, device) as place:
        for numbers, inputs, bad in read_ahead(transform, numbered, batch_size=batch_size):
            problems += [f"{error.code}: {error}" for _, error in bad]
            if problems:  # the others are looked at too, so that all that fail are named
                continue
            rows.append(read(encoder(**on(inputs, place))).float().cpu())
            odd = (~rows[-1].isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            if odd:
                name = _name(images[numbers[odd[0]]])
                raise DataError(f"the tower gives NaN or infinity for {name}; look at both")
    if problems:
        head = f"{len(problems)} of {len(images)} images cannot be used; mend them or take their lines out:"
        raise DataError("\n".join([head, *lines(problems, _LISTED)]))
    return torch.cat(rows)


def _name(image: Path | Image.Image) -> str:
    return f"an image of {image.width}x{image.height} px" if isinstance(image, Image.Image) else str(image)


@contextmanager
def _in_eval_mode(encoder: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    import torch

    home = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    place = home if device is None else torch.device(device)
    encoder.to(place)
    try:
        with in_mode(encoder):
            yield place
    finally:
        encoder.to(home)
