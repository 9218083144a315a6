"""The vision tower by itself: what it returns, in which order, and whether it can be trained."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.check.report import Finding, not_applicable
from vlm.check.subject import PIXELS, Check, Subject, Tensors
from vlm.encoders.contract import EncoderOutput, check_output
from vlm.errors import ConfigError
from vlm.images.fused import unpack
from vlm.model.modes import in_mode
from vlm.model.parts import encoder_spec
from vlm.words import listed

FEW = 36
"""Up to so many patches all are tried; of more, some groups of neighbours in the corners and inside."""
DRAWS, DRAWS_OF_MANY = 8, 1
"""Noises for each patch and image. The fewer patches there are, the more of each other they see through attention."""
OWN_SHARE = 0.9
"""Least share of the patches tried that their own feature has to follow more than any other patch tried."""
SHOWN = 3


def contract(subject: Subject) -> Finding:
    """Type, shape, width, dtype, device and finiteness of what the tower returns; its mask and its grid."""
    wrong = problem(subject)
    detail = "" if wrong else "features of three images and of one, a mask or None, and a grid"
    return Finding(measured=int(bool(wrong)), limit=0, detail=detail, problem=wrong)


@torch.no_grad()
def problem(subject: Subject) -> str:
    """What is wrong with the tower's output, of three images and of one alone, and what to do; "" when nothing is."""
    for rows in ((0, 1, 2), (0,)):
        tensors = _pixels(subject.batch(rows))
        try:
            output = _run(subject, tensors)
        except ConfigError as error:
            return str(error)
        wrong = _unlike_its_input(output, subject, tensors) or _wrong_cells(output, subject, tensors)
        if wrong:
            return f"the {subject.model.config.encoder} tower: {wrong}"
    return ""


def _run(subject: Subject, tensors: Tensors, *, training: bool = False) -> EncoderOutput:
    """Run the tower, which may be code of the user's own: whatever it raises is told in a line.

    Raises:
        ConfigError: it raises something, or returns what is no `EncoderOutput` of these images.
    """
    model = subject.model
    tower: Any = model.model.vision_tower
    try:
        with in_mode(model, training=training):
            output = tower(**tensors)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        where = f"{Path(place.filename).name}:{place.lineno}"
        raise ConfigError(f"the {model.config.encoder} tower raises {text} ({where})") from error
    check_output(output, model.config, len(tensors["pixel_values"]))
    checked: EncoderOutput = output
    return checked


def _unlike_its_input(output: EncoderOutput, subject: Subject, tensors: Tensors) -> str:
    """Another dtype or device than the tower's, or numbers that are none."""
    tower: Any = subject.model.model.vision_tower
    features, device = output.features, tensors["pixel_values"].device
    if features.dtype != tower.dtype:
        own = _short(tower.dtype)
        return f"features are {_short(features.dtype)}, its weights {own}; return them as features.to(self.dtype)"
    for name, value in zip(output._fields, output, strict=True):
        if value is not None and value.device != device:
            return f"{name} is on {value.device}, the pixels are on {device}; make it with device=pixel_values.device"
    real = features if output.mask is None else features[output.mask]
    wrong = int((~real.isfinite()).sum())
    if wrong:
        return (
            f"{wrong} of {real.numel()} features are NaN or infinite; look for a division by 0, or an overflow of"
            f" {_short(features.dtype)}"
        )
    return ""


def _wrong_cells(output: EncoderOutput, subject: Subject, tensors: Tensors) -> str:
    """A grid that is not that of the images, or another number of real rows than it has cells."""
    config = subject.model.config
    if "spatial_shapes" in tensors:
        wanted = tensors["spatial_shapes"].tolist()
    else:
        wanted = [list(encoder_spec(config.encoder).grid(config.vision_config))] * len(output.grid)
    grid = output.grid.tolist()
    for number, (got, cells) in enumerate(zip(grid, wanted, strict=True)):
        if got != cells:
            return f"grid of image {number} is {got}, its (rows, columns) of patches are {cells}"
    rows = output.features.shape[1]
    counts = [rows] * len(grid) if output.mask is None else output.mask.sum(1).tolist()
    for number, (count, (high, wide)) in enumerate(zip(counts, grid, strict=True)):
        if count != high * wide:
            return (
                f"image {number} has {count} real rows of features for {high} x {wide} = {high * wide} patches; leave"
                f" out class and register tokens, and mark padding rows, and only these, False in the mask"
            )
    given = tensors.get("pixel_attention_mask")
    if given is not None and output.mask is not None and given.shape == output.mask.shape:
        if not torch.equal(given.bool(), output.mask):
            return "the mask marks other rows as patches than pixel_attention_mask does; return that one as bool"
    return ""


@torch.no_grad()
def order(subject: Subject) -> Finding:
    """Noise is laid on one patch after the other. Of the patches tried, a feature's own has to move it most."""
    # Three images where they have one grid; one of a NaFlex tower.
    base = _pixels(subject.batch((0,) if "spatial_shapes" in subject.batch((0,)) else (0, 1, 2)))
    before, grid = _features(subject, base)
    cells = _tried(*grid)
    if len(cells) < 2:
        return not_applicable("an image is one patch: there is no order")
    draws = DRAWS if grid[0] * grid[1] <= FEW else DRAWS_OF_MANY
    places = [row * grid[1] + column for row, column in cells]
    many = {name: value.repeat(draws, *[1] * (value.ndim - 1)) for name, value in base.items()}
    before = before.repeat(draws, 1, 1)
    noise = torch.randn(many["pixel_values"].shape, generator=torch.Generator().manual_seed(0)).to(before.device)
    rows = []
    for cell in cells:
        after = _features(subject, _noisy(subject, many, noise, cell, grid))[0]
        rows.append((after - before).pow(2).sum(-1).mean(0).sqrt())
    moves = torch.stack(rows)[:, places].double()
    if not bool((moves > 0).any(0).all()) or not bool((moves > 0).any(1).all()):
        return Finding(problem="noise on some patches moves no feature: these pixels do not reach the features")
    # A patch that moves everything, or a feature that follows everything, says nothing about the order.
    for _ in range(10):
        moves = moves / moves.mean(1, keepdim=True)
        moves = moves / moves.mean(0, keepdim=True)
    strongest = moves.argmax(0).tolist()
    wrong = [
        f"feature {places[index]} (row {cells[index][0]}, column {cells[index][1]}) follows the patch at row"
        f" {cells[winner][0]}, column {cells[winner][1]}"
        for index, winner in enumerate(strongest)
        if winner != index
    ]
    share = 1 - len(wrong) / len(cells)
    detail = f"share of {len(cells)} patches of {grid[0]} x {grid[1]} whose own feature follows them most"
    problem = "" if share >= OWN_SHARE else "; ".join(wrong[:SHOWN]) + "; features must be in row order"
    return Finding(measured=share, limit=OWN_SHARE, relation=">=", detail=detail, problem=problem)


def _tried(rows: int, columns: int) -> list[tuple[int, int]]:
    """(row, column) of the patches to change: neighbours belong to it, or a shift by one would not be seen."""
    if rows * columns <= FEW:
        return [(row, column) for row in range(rows) for column in range(columns)]
    anchors = [(0, 0), (0, columns - 1), (rows - 1, 0), (rows // 2, columns // 3)]
    found = []
    for row, column in anchors:
        below = row + 1 if row + 1 < rows else row - 1
        beside = column + 1 if column + 1 < columns else column - 1
        found += [(row, column), (max(below, 0), column), (row, max(beside, 0))]
    return list(dict.fromkeys(found))


def _noisy(subject: Subject, tensors: Tensors, noise: Tensor, cell: tuple[int, int], grid: tuple[int, int]) -> Tensors:
    """Pixels with noise on one cell of the grid, in whatever form the tower reads them."""
    pixels, (row, column) = tensors["pixel_values"].clone(), cell
    if "spatial_shapes" in tensors:
        pixels[:, row * grid[1] + column] += noise[:, row * grid[1] + column]
    elif members := encoder_spec(subject.model.config.encoder).members(subject.model.config.vision_config):
        sides = [int(config.image_size) for _, config in members]
        for part, own in zip(unpack(pixels, sides), unpack(noise, sides), strict=True):
            _lay_on(part, own, cell, grid)  # a view of the copy
    else:
        _lay_on(pixels, noise, cell, grid)
    return {**tensors, "pixel_values": pixels}


def _lay_on(pixels: Tensor, noise: Tensor, cell: tuple[int, int], grid: tuple[int, int]) -> None:
    """Add noise to the part of float[M, 3, H, W] that a cell stands for; pixels beyond whole patches are at the end."""
    patch = [side // count for side, count in zip(pixels.shape[-2:], grid, strict=True)]
    top, left = cell[0] * patch[0], cell[1] * patch[1]
    pixels[..., top : top + patch[0], left : left + patch[1]] += noise[
        ..., top : top + patch[0], left : left + patch[1]
    ]


def gradients(subject: Subject) -> Finding:
    """A backward pass from the features, as training makes it, to the pixels and to every parameter of the tower."""
    model = subject.model
    tower: Any = model.model.vision_tower
    named = [(name, weight) for name, weight in tower.named_parameters() if weight.is_floating_point()]
    if any(weight.device.type == "meta" for _, weight in named):
        return not_applicable("the tower is offloaded to the disk; open the model whole to check this")
    tensors = _pixels(subject.batch((0,)))
    pixels = tensors["pixel_values"].to(tower.dtype).requires_grad_()
    flags = [weight.requires_grad for _, weight in named]
    buffers = {name: value.clone() for name, value in tower.named_buffers()}  # running statistics
    try:
        for _, weight in named:
            weight.requires_grad_()
        with torch.enable_grad():
            features = _run(subject, {**tensors, "pixel_values": pixels}, training=True).features
            if not features.requires_grad:
                return Finding(
                    problem="features have no gradient: the tower detaches them, or runs under torch.no_grad"
                )
            noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).to(features)
            wanted = [pixels, *(weight for _, weight in named)]
            found = torch.autograd.grad((features * noise).sum(), wanted, allow_unused=True)
    finally:
        for (_, weight), flag in zip(named, flags, strict=True):
            weight.requires_grad_(flag)
        with torch.no_grad():
            for name, value in tower.named_buffers():
                value.copy_(buffers[name])
    return _judged(["the pixels", *(name for name, _ in named)], found)


def _judged(names: list[str], gradients: Any) -> Finding:
    missing = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
    broken = [n for n, g in zip(names, gradients, strict=True) if g is not None and not bool(g.isfinite().all())]
    zero = [n for n, g in zip(names, gradients, strict=True) if g is not None and not bool(g.any())]
    unreached = f"no gradient reaches {listed(missing, SHOWN)}: detached, computed under no_grad, or not used"
    problems = [unreached] if missing else []
    problems += [f"the gradient is NaN or infinite at {listed(broken, SHOWN)}"] if broken else []
    if "the pixels" in zero:
        problems.append("the gradient at the pixels is 0: nothing of the image reaches the features")
    detail = f"of {len(names) - 1} tensors of the tower and the pixels, those that no gradient reaches"
    zero = [name for name in zero if name != "the pixels"]
    if zero:
        detail += f"; it is exactly 0 at {listed(zero, SHOWN)}"
    wrong = {*missing, *broken} | ({"the pixels"} if len(problems) > bool(missing) + bool(broken) else set())
    return Finding(measured=len(wrong), limit=0, detail=detail, problem="; ".join(problems))


def _features(subject: Subject, tensors: Tensors) -> tuple[Tensor, tuple[int, int]]:
    """(float32[M, P, E], (rows, columns)) of images of one size, without padding rows."""
    output = _run(subject, tensors)
    rows, columns = output.grid[0].tolist()
    features = output.features if output.mask is None else output.features[output.mask]
    return features.float().reshape(len(output.grid), rows * columns, -1), (rows, columns)


def _pixels(tensors: Tensors) -> Tensors:
    return {name: tensors[name] for name in PIXELS if name in tensors}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CHECKS = (
    Check("tower", "the vision tower returns what its contract says", contract, 10, runs_tower=False),
    Check("patch-order", "features are in the order of the patches", order, 20),
    Check("tower-gradients", "a gradient reaches the pixels and every weight of the tower", gradients, 30),
)
