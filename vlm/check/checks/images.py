"""Images on their way in: as many placeholders as image tokens, pixels in the range that the tower was trained on."""

from __future__ import annotations

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlm.check.report import Finding
from vlm.check.subject import PIXELS, Check, Subject, Tensors, picture, text_logits
from vlm.errors import DataError
from vlm.images.fused import unpack
from vlm.images.transforms import ImageTransform
from vlm.model.modes import in_mode
from vlm.model.parts import encoder_spec, towers

SIZES = ((1, 1), (1, 64), (64, 1), (7, 300), (300, 7), (200, 100), (97, 113))
"""(width, height): down to one pixel, up to a ratio of 1:64."""
OFF_RANGE = 1e-3
"""Most that black or white may miss their place: 8-bit values have no rounding there."""
OVERSHOOT = 0.1
"""Most that a resized photo may leave the range, in parts of it: cubic filters overshoot at edges."""


@torch.no_grad()
def tokens(subject: Subject) -> Finding:
    """Placeholders written by the processor against tokens given by tower and projector, image by image; and two wrong
    counts that the model has to refuse."""
    processor = subject.processor
    worst, where = 0, ""
    counts = []
    for number, size in enumerate(SIZES):
        batch = processor([picture(number, size)], ["caption en"])
        placeholders = int((batch.input_ids == processor.image_token_id).sum())
        given = _tokens_per_image(subject, {name: batch[name] for name in batch.keys()})
        counts += given
        if abs(placeholders - sum(given)) > worst or not where:
            worst = abs(placeholders - sum(given))
            where = f"{placeholders} placeholders, {sum(given)} tokens at {size[0]}x{size[1]} px"
    detail = f"largest difference over {len(SIZES)} sizes from 1x1 px; {min(counts)} to {max(counts)} tokens per image"
    problem = where if worst else _refuses_wrong_counts(subject)
    return Finding(measured=worst, limit=0, detail=detail, problem=problem)


def _tokens_per_image(subject: Subject, tensors: Tensors) -> list[int]:
    pixels = [tensors[name].to(subject.model.device) for name in PIXELS if name in tensors]
    with in_mode(subject.model):
        _, counts = subject.model.model.project(subject.model.encode(*pixels))
    result: list[int] = counts.tolist()
    return result


def _refuses_wrong_counts(subject: Subject) -> str:
    """What is wrong if the model takes a batch with a placeholder too few or too many."""
    tensors = subject.batch((0, 1))
    placeholder, other = subject.processor.image_token_id, int(subject.ordinary_ids[0])
    one_less, one_more = tensors["input_ids"].clone(), tensors["input_ids"].clone()
    one_less[0, int((one_less[0] == placeholder).int().argmax())] = other
    one_more[0, int((tensors["token_type_ids"][0] == 1).int().argmax())] = placeholder
    for ids, what in ((one_less, "one placeholder too few"), (one_more, "one placeholder too many")):
        try:
            text_logits(subject.model, {**tensors, "input_ids": ids}, 1)
        except DataError:
            continue
        return f"the model takes a batch with {what} without a word"
    return ""


def pixel_range(subject: Subject) -> Finding:
    """Black, white and photo-like images through the processor, against the normalisation of the tower's own transform
    (`transform` in the encoder's file)."""
    config = subject.model.config
    own = encoder_spec(config.encoder).transform(config.vision_config)
    problem = _size_problem(subject)
    if problem and encoder_spec(config.encoder).members(config.vision_config):  # they cannot be told apart
        return Finding(measured=math.nan, limit=OFF_RANGE, detail="off the tower's range", problem=problem)
    found = [
        (*_range_of(subject, number, wanted, has), wanted, has)
        for number, (wanted, has) in enumerate(zip(own.each, subject.processor.image_transform.each, strict=True))
    ]
    measured, detail, wanted, has = max(found, key=lambda entry: math.inf if math.isnan(entry[0]) else entry[0])
    if not measured <= OFF_RANGE:
        expected = f"mean {wanted.mean} std {wanted.std}"
        problem = f"the {config.encoder} tower expects {expected}, the processor has mean {has.mean} std {has.std}"
    return Finding(measured=measured, limit=OFF_RANGE, detail=f"off the tower's range; {detail}", problem=problem)


def _range_of(subject: Subject, number: int, own: ImageTransform, has: ImageTransform) -> tuple[float, str]:
    """How far the pixels of one member (or of the tower) miss its range, and where they lie."""
    low = torch.tensor([(0 - mean) / std for mean, std in zip(own.mean, own.std, strict=True)])
    high = torch.tensor([(1 - mean) / std for mean, std in zip(own.mean, own.std, strict=True)])
    black, white = (_colours(subject, Image.new("RGB", (60, 45), (level,) * 3), number) for level in (0, 255))
    pictures = [picture(seed, size) for seed, size in enumerate(((60, 45), (20, 90)))]
    photos = torch.cat([_colours(subject, image, number) for image in pictures])
    flat = torch.cat([(black - low).abs().flatten(), (white - high).abs().flatten()]).max()
    outside = torch.maximum(low - photos, photos - high).max() / (high - low).min()
    # The photo's allowance is wider; it is brought to the scale of the other limit.
    excess = max(0.0, float(outside)) * OFF_RANGE / OVERSHOOT if torch.isfinite(outside) else math.nan
    detail = f"black and white land at {_span(black)} and {_span(white)}, photos in {_span(photos)}"
    return float(torch.tensor([float(flat), excess]).max()), detail


def _colours(subject: Subject, image: Image.Image, number: int) -> Tensor:
    """float32[K, 3]: an image's pixel values as the processor gives them (to member `number` of a fused tower), padding
    patches left out."""
    batch = subject.processor([image], ["caption en"])
    pixels: Any = batch.pixel_values
    if batch.pixel_attention_mask is not None:
        return pixels[batch.pixel_attention_mask.bool()].reshape(-1, 3)
    if pixels.ndim == 2:
        pixels = unpack(pixels, _sides(subject))[number]
    return pixels.permute(0, 2, 3, 1).reshape(-1, 3)


def _sides(subject: Subject) -> list[int]:
    """Sides of the images that the members of a fused tower read."""
    config = subject.model.config
    return [int(own.image_size) for _, own in towers(config.encoder, config.vision_config)]


def _size_problem(subject: Subject) -> str:
    """Whether the pixels have the tower's size: a square side, or the width of a patch."""
    vision = subject.model.config.vision_config
    batch = subject.processor([picture(0, (60, 45))], ["caption en"])
    assert batch.pixel_values is not None
    got = tuple(batch.pixel_values.shape[1:])
    if batch.spatial_shapes is not None:
        wanted: tuple[int, ...] = (got[0], 3 * vision.patch_size**2)
    elif encoder_spec(subject.model.config.encoder).members(vision):
        wanted = (sum(3 * side**2 for side in _sides(subject)),)
    else:
        wanted = (3, vision.image_size, vision.image_size)
    return "" if got == wanted else f"pixels have the shape {got}, the tower reads {wanted}"


def _span(values: Tensor) -> str:
    low, high = f"{float(values.min()):.3g}", f"{float(values.max()):.3g}"
    return low if low == high else f"[{low}, {high}]"


CHECKS = (
    Check("image-tokens", "placeholders and image tokens are equal in number", tokens, 150),
    Check("image-range", "pixels arrive in the tower's range and size", pixel_range, 160, runs_tower=False),
)
