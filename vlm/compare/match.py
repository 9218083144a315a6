"""Towers brought to the same number of image tokens, or the same resolution, as far as their patches allow.

Only the size of the images changes: `image_size` of a tower that reads squares, in whole patches, and the patch budget
(`max_num_patches`) of a NaFlex tower. Tokens are counted after the projector, as a mean over real images.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from vlm.build.choice import Choice
from vlm.build.towers import choose, sized
from vlm.compare.config import Arm
from vlm.compare.matched import Matched
from vlm.errors import ImageError
from vlm.images.load import image_size
from vlm.images.transforms import ImageTransform
from vlm.model.projecting import counter
from vlm.settings import from_dict
from vlm.train.config import ModelConfig
from vlm.train.models import tower_settings, towers
from vlm.words import aligned

How = Literal["tokens", "resolution", "none"]
"""Kind of several towers in one, whose image sizes belong together."""
MOST_PATCHES = 1 << 14
"""No tower is brought to more than this."""


def match(arms: Sequence[Arm], how: How, sizes: Mapping[tuple[int, int], int], target: int | None) -> list[Matched]:
    """Bring the arms to one number of tokens or one resolution.

    Args:
        arms: the first one is the reference.
        how: `tokens`, `resolution`, or `none` to leave each as it is.
        sizes: (height, width) of images -> how many have it.
        target: tokens to aim at (`how="tokens"`); None: those of the first arm.

    A tower whose settings give an image size or a budget keeps it.
    """
    with _quiet():
        towers = [_Tower(arm, sizes) for arm in arms]
        if how == "none":
            return [tower.as_is("its own") for tower in towers]
        if how == "resolution":
            side = towers[0].side
            return [tower.with_side(side) for tower in towers]
        wanted = towers[0].tokens if target is None else float(target)
        reference = [towers[0].as_is("the reference")] if target is None else [towers[0].with_tokens(wanted)]
        return reference + [tower.with_tokens(wanted) for tower in towers[1:]]


class _Tower:
    """An arm's tower as its settings make it."""

    def __init__(self, arm: Arm, sizes: Mapping[tuple[int, int], int]) -> None:
        self.arm, self.sizes = arm, sizes
        self.count = counter(arm.projector_settings)
        self.kind, _, self.transform = self._make(arm)
        self.tokens = self._mean(self.transform)

    @property
    def pinned(self) -> bool:
        model, image = self.arm.model, self.arm.model.get("image") or {}
        given = model.get("image_size") is not None or sized(model["encoder"])[1] is not None
        return bool(self.transform.members) or given or image.get("max_num_patches") is not None

    @property
    def why_pinned(self) -> str:
        return "fused towers keep their sizes" if self.transform.members else "size given in its settings"

    @property
    def side(self) -> int:
        """Of a square image, in pixels."""
        return self.transform.square_side

    def as_is(self, note: str, exact: bool = True) -> Matched:
        return Matched(self.arm, self.kind, self.transform, self.tokens, note, exact)

    def with_tokens(self, wanted: float) -> Matched:
        """As close to `wanted` tokens as whole patches allow; among equals its own size, or one that fills the blocks
        of the projector, or the one nearest to its own."""
        if self.pinned:
            return self._checked(self.as_is(self.why_pinned), wanted)
        if self._constant():
            return self._checked(self.as_is(f"the projector gives {self.tokens:.0f} tokens at any size"), wanted)
        return self._checked(
            self._budget_for(wanted) if self.transform.any_aspect else self._square_for(wanted), wanted
        )

    def with_side(self, side: int) -> Matched:
        """Images of `side` pixels, rounded to whole patches."""
        if self.pinned:
            return replace(self.as_is(self.why_pinned), exact=self.side == side)
        if self.side == side:
            return self.as_is("its own")
        patch = self.transform.patch_size
        rows = max(1, round(side / patch))
        made = self._changed(self.transform.size_of(rows))
        note = made.note if rows * patch == side else f"{made.note}; {side} px is no multiple of its {patch} px patches"
        return replace(made, note=note, exact=rows * patch == side)

    def _checked(self, made: Matched, wanted: float) -> Matched:
        if abs(made.tokens - wanted) < 0.5:
            return made
        return replace(made, exact=False, note=f"{made.note}; {made.tokens:.4g} tokens instead of {wanted:.4g}")

    def _constant(self) -> bool:
        return self.count((1, 1)) == self.count((64, 64))

    def _square_for(self, wanted: float) -> Matched:
        own = self.transform.grid(0, 0)[0]
        sides = range(1, math.isqrt(MOST_PATCHES) + 1)

        def cost(n: int) -> tuple[float, bool, bool, int]:
            tokens = self.count((n, n))
            # A projector's last blocks are full where one patch more would be one token more.
            return abs(tokens - wanted), n != own, tokens == self.count((n + 1, n + 1)), abs(n - own)

        rows = min(sides, key=cost)
        return self.as_is("its own") if rows == own else self._changed(self.transform.size_of(rows))

    def _budget_for(self, wanted: float) -> Matched:
        own = self.transform.max_patches
        if abs(self.tokens - wanted) < 0.5:
            return self.as_is("its own")
        # Images that keep their resolution stop growing before: no larger budget than has an effect.
        reachable = min(wanted, self._with_budget(MOST_PATCHES))
        upper = _first(lambda n: self._with_budget(n) >= reachable, MOST_PATCHES)
        budget = min((own, max(1, upper - 1), upper), key=lambda n: (abs(self._with_budget(n) - wanted), abs(n - own)))
        return self.as_is("its own") if budget == own else self._changed({"max_num_patches": budget})

    def _with_budget(self, budget: int) -> float:
        return self._mean(replace(self.transform, max_num_patches=budget))

    def _changed(self, change: dict[str, Any]) -> Matched:
        model = dict(self.arm.model)
        if "image_size" in change:
            note = f"image size {self.transform.image_size} -> {change['image_size']} px"
            model |= change
        else:
            note = f"budget {self.transform.max_patches} -> {change['max_num_patches']} patches"
            model["image"] = {**(model.get("image") or {}), **change}
        arm = replace(self.arm, model=model)
        kind, _, transform = self._make(arm)
        return Matched(arm, kind, transform, self._mean(transform), note, True)

    @staticmethod
    def _make(arm: Arm) -> tuple[str, Any, ImageTransform]:
        choice = make_tower(from_dict(ModelConfig, arm.model, where=f"model of {arm.name}"))
        return choice.kind, choice.config, choice.transform

    def _mean(self, transform: ImageTransform) -> float:
        total = sum(n * self.count(transform.grid(*size)) for size, n in self.sizes.items())
        return total / sum(self.sizes.values())


def make_tower(config: ModelConfig) -> Choice:
    """The tower (or towers) that a run of these settings would begin with; no weight is read. Raises `VLMError`."""
    return choose(towers(config), **tower_settings(config))


def _first(holds: Callable[[int], bool], most: int) -> int:
    """The smallest number from 1 up to `most` for which a condition holds that never ceases to; else `most`."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


@contextmanager
def _quiet() -> Iterator[None]:
    """Making a tower's configuration warns about pixels that are never seen; the run itself says it again."""
    logger = logging.getLogger("vlm.build")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def table(matched: Sequence[Matched], how: How) -> str:
    """What each arm reads, for people."""
    rows = [("run", "kind", "image", "tokens", "match")]
    for item in matched:
        rows.append((item.arm.name, item.kind, item.transform.short(), f"{item.tokens:.4g}", item.note))
    lines = aligned(rows)
    rest = [item.arm.name for item in matched if not item.exact]
    if how != "none" and rest:
        lines.append(f"not matched exactly ({how}): {', '.join(rest)}")
    return "\n".join(lines)


def sizes_of(paths: Sequence[Path | Image.Image], most: int = 200) -> Counter[tuple[int, int]]:
    """(height, width) of the first `most` images that can be opened -> how many have it; only headers are read."""
    sizes: Counter[tuple[int, int]] = Counter()
    for path in list({str(path): path for path in paths}.values())[:most]:
        try:
            width, height = image_size(path)
        except ImageError:
            continue
        sizes[height, width] += 1
    return sizes
