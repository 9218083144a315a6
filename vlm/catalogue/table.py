"""The catalogue for people: a table of many checkpoints, or everything about a few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill

from vlm.catalogue.choice import uses
from vlm.catalogue.released import Checkpoint, load
from vlm.words import aligned, columns

DETAILED = 3
"""So many checkpoints, chosen by name, are shown with all that is known of them."""
_WIDTH = 110


def page(
    checkpoints: Sequence[Checkpoint], memory: Mapping[str, int], text: Mapping[str, str], *, chosen: bool = False
) -> str:
    """A table, or the details where a few were chosen by name.

    Args:
        memory: id -> bytes to run it.
        text: family -> how its text is read.
        chosen: they were chosen by name.
    """
    if not checkpoints:
        return "no released checkpoint fits"
    if chosen and len(checkpoints) <= DETAILED:
        return "\n\n".join(_details(one, memory[one.id], text) for one in checkpoints)
    shown = [one for one in checkpoints if chosen or not one.fine_tuned]
    told = [_table(shown, memory)]
    if len(shown) < len(checkpoints):
        told.append(
            f"\n{len(checkpoints) - len(shown)} more are fine-tuned on one task each: `vlm models ft`,"
            " `vlm models docvqa`"
        )
    return "\n".join(told)


def choice(use: str, reasons: Mapping[str, str], checkpoints: Sequence[Checkpoint], memory: Mapping[str, int]) -> str:
    """What is worth taking for a use, with a sentence each; the first is the one to take."""
    if not checkpoints:
        return "nothing that is worth taking for it fits"
    told = [f"{use}: {uses()[use].asks}", ""]
    for number, one in enumerate(checkpoints):
        facts = f"{one.image}, {one.tokens} tokens, {_billions(one)}, {_gigabytes(memory[one.id])} GB"
        told += [f"{'->' if number == 0 else '  '} {one.id}   {facts}", _indented(f"{reasons[one.id]}.", 3)]
    return "\n".join(told)


def _table(checkpoints: Sequence[Checkpoint], memory: Mapping[str, int]) -> str:
    heading = ("google/", "image", "tokens", "tower M", "all M", "memory GB", "text", "ImageNet", "COCO T2I", "DocVQA")
    rows: list[tuple[str, ...]] = [heading]
    for one in checkpoints:
        figures = [f"{one.published[key]:.1f}" if key in one.published else "-" for key in _SHOWN]
        sizes = [f"{one.parameters[key] / 1e6:,.0f}" for key in ("vision", "total")]
        rows.append(
            (one.name, one.image, str(one.tokens), *sizes, _gigabytes(memory[one.id]), str(one.context), *figures)
        )
    return columns(rows, left=(0, 1))


_SHOWN = ("imagenet", "coco_t2i", "docvqa")


def _details(checkpoint: Checkpoint, memory: int, text: Mapping[str, str]) -> str:
    catalogue = load()
    parts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in checkpoint.parameters.items())
    rows = [
        ("tower", f"{checkpoint.tower}/{checkpoint.patch}, {checkpoint.image}, {checkpoint.tokens} tokens"),
        *([("decoder", checkpoint.decoder)] if checkpoint.decoder else []),
        ("parameters", parts),
        ("memory", f"{_gigabytes(memory)} GB to run it on one image"),
        ("text", f"{checkpoint.context} positions, {checkpoint.vocabulary:,} pieces; {text[checkpoint.family]}"),
        ("licence", checkpoint.licence),
        *((catalogue.figures[key], str(value)) for key, value in checkpoint.published.items()),
        *((f"ImageNet-1k at {key} patches", str(value)) for key, value in checkpoint.imagenet_by_patches.items()),
    ]
    told = [checkpoint.id, *(f"  {line}" for line in aligned(rows))]
    if checkpoint.published:
        told.append(_indented(f"figures: {catalogue.source(checkpoint)}", 2))
    return "\n".join([*told, *(_indented(f"trap: {trap}", 2) for trap in checkpoint.traps)])


def _indented(text: str, by: int) -> str:
    return fill(text, _WIDTH, initial_indent=" " * by, subsequent_indent=" " * (by + 2))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f}"


def _billions(checkpoint: Checkpoint) -> str:
    total = checkpoint.parameters["total"]
    return f"{total / 1e9:.1f} B parameters" if total >= 1e9 else f"{total / 1e6:.0f} M parameters"
