"""What a vision tower gives for images, and what a probe of it found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlm.errors import ConfigError, DataError, ImageError
from vlm.images.load import load_image
from vlm.model.modes import in_mode
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
    rows = []
    with torch.no_grad(), _in_eval_mode(encoder, device) as place:
        for start in range(0, len(images), batch_size):
            chunk = _load(images, start, start + batch_size, transform.background)
            pixels = transform(chunk)
            naflex = {}
            if pixels.pixel_attention_mask is not None and pixels.spatial_shapes is not None:
                naflex = {
                    "pixel_attention_mask": pixels.pixel_attention_mask.to(place),
                    "spatial_shapes": pixels.spatial_shapes.to(place),
                }
            rows.append(read(encoder(pixels.pixel_values.to(place), **naflex)).float().cpu())
            odd = (~rows[-1].isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            if odd:
                raise DataError(f"the tower gives NaN or infinity for {_name(images[start + odd[0]])}; look at both")
    return torch.cat(rows)


def _load(
    images: Sequence[Path | Image.Image], start: int, stop: int, background: tuple[int, int, int]
) -> list[Image.Image]:
    """Decode a batch. When one fails, the rest is decoded too, so that all that fail are named."""
    loaded: list[Image.Image] = []
    problems: list[str] = []
    for index in range(start, len(images)):
        if index >= stop and not problems:
            break
        try:
            image = load_image(images[index], background=background)
        except ImageError as error:
            problems.append(f"{error.code}: {error}")
            continue
        if not problems:
            loaded.append(image)
    if problems:
        head = f"{len(problems)} of {len(images)} images cannot be used; mend them or take their lines out:"
        raise DataError("\n".join([head, *lines(problems, _LISTED)]))
    return loaded


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
