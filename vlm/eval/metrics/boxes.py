"""Referring expressions: boxes in PaliGemma's `<loc>` tokens, intersection over union, accuracy at 0.5.

`vlm.text.locations` reads the tokens; here is what counts as right.

Scores of masks are not here: sixteen `<seg>` tokens become a mask only through the decoder of the VQ-VAE that made them
(`vlm.eval.segmentation`, given its weights). `refcoco_paligemma` gives the box accuracies of the same evaluator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vlm.errors import DataError
from vlm.eval.metrics.registry import Info, Predictions, References, register
from vlm.eval.metrics.result import MetricResult, mean_result
from vlm.text.locations import Box, first_segment, loc_to_box, problems, tokens_to_box


def _segment_to_box(text: str) -> Box | None:
    """The box of a text that starts with a whole segment, four `<loc>` and sixteen `<seg>` tokens."""
    segment = first_segment(text)
    return None if segment is None else tokens_to_box(segment[0])


def box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1, without a +1 for pixels; 0 where both have no area."""
    common = _area(
        max(first[0], second[0]), max(first[1], second[1]), min(first[2], second[2]), min(first[3], second[3])
    )
    union = _area(*first) + _area(*second) - common
    return common / union if union > 0 else 0.0


def _area(x0: float, y0: float, x1: float, y1: float) -> float:
    return max(x1 - x0, 0.0) * max(y1 - y0, 0.0)


# --- Registered metrics -----------------------------------------------------------------------------------------------


def _gold_box(name: str, key: str, references: References, info: Info) -> Box:
    """The gold box in shares of the image: `box` in pixels with `image_size`, else the gold text's `<loc>` tokens."""
    facts = info[key]
    if facts.get("box") is None:
        for text in references[key]:
            box = loc_to_box(text)
            if box is not None:
                return box
        raise DataError(
            f"{name}: item {key!r} has no gold box; give 'box' [x0, y0, x1, y1] in pixels with 'image_size' [width, "
            f"height], or a gold text with four <loc> tokens (got {references[key][0]!r}{_why(references[key][0])})"
        )
    if facts.get("image_size") is None:
        raise DataError(f"{name}: item {key!r} has 'box' in pixels but no 'image_size' [width, height]")
    x0, y0, x1, y1 = _numbers(name, key, "box", facts["box"], 4)
    width, height = _numbers(name, key, "image_size", facts["image_size"], 2)
    if width <= 0 or height <= 0 or x1 <= x0 or y1 <= y0:
        raise DataError(f"{name}: item {key!r} has an empty box {facts['box']} or image {facts['image_size']}")
    return x0 / width, y0 / height, x1 / width, y1 / height


def _why(gold: str) -> str:
    return "".join(f"; {problem}" for problem in problems(gold)[:3])


def _numbers(name: str, key: str, fact: str, value: Any, how_many: int) -> list[float]:
    numbers = list(value) if isinstance(value, list | tuple) else []
    if len(numbers) != how_many or not all(type(number) in (int, float) for number in numbers):
        raise DataError(f"{name}: {fact!r} of item {key!r} must be {how_many} numbers, got {value!r}")
    return [float(number) for number in numbers]


def _score(
    name: str,
    rule: str,
    read: Callable[[str], Box | None],
    predictions: Predictions,
    references: References,
    info: Info,
) -> MetricResult:
    ious: dict[str, float] = {}
    invalid = 0
    for key in references:
        said = read(predictions[key])
        invalid += said is None
        gold = _gold_box(name, key, references, info)
        ious[key] = 0.0 if said is None else box_iou(said, gold)
    scores = {key: float(iou >= 0.5) for key, iou in ious.items()}
    details: dict[str, float] = {
        "accuracy_at_0.75": sum(iou >= 0.75 for iou in ious.values()) / len(ious),
        "mean_box_iou": sum(ious.values()) / len(ious),
        "num_invalid": invalid,
    }
    return mean_result(name, scores, rule, details=details)


_EVERYWHERE = "<loc0000><loc0000><loc1023><loc1023>"


def _whole_image(references: References, info: Info) -> list[str]:
    return [_EVERYWHERE]


def _whole_image_segmented(references: References, info: Info) -> list[str]:
    return [_EVERYWHERE + "<seg000>" * 16]


@register(
    "refcoco",
    summary="RefCOCO accuracy at box IoU 0.5, from <loc> tokens",
    reads="references",
    per_item_is_right=True,
    constants=_whole_image,
    uses=("box", "image_size"),
)
def refcoco(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """Share of predictions whose first box overlaps the gold box by an IoU of at least 0.5.

    Raises:
        DataError: an item has no gold box.
    """
    rule = (
        "RefCOCO: 1 if the first four <loc> tokens in a row, decoded by t/1023, give a box of IoU >= 0.5 with the gold "
        "box (no +1 for pixels); no box, or one without area, is a miss and counted (num_invalid)"
    )
    return _score("refcoco", rule, loc_to_box, predictions, references, info)


@register(
    "refcoco_paligemma",
    summary="RefCOCO box accuracy as PaliGemma's segmentation evaluator scores it (not its mask IoU)",
    reads="references",
    per_item_is_right=True,
    constants=_whole_image_segmented,
    uses=("box", "image_size"),
)
def refcoco_paligemma(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """`boxacc/0.5` of Google's `segmentation` evaluator. Raises DataError as `refcoco`."""
    rule = (
        "PaliGemma's transfers on RefCOCO segmentation, boxes only: the prediction must start with four <loc> and "
        "sixteen <seg> tokens and the box have an area, else it is invalid and a miss; 1 for a box IoU >= 0.5; the "
        "mean mask IoU of the same evaluator needs its mask decoder (vae-oid.npz) and is not part of this"
    )
    return _score("refcoco_paligemma", rule, _segment_to_box, predictions, references, info)
