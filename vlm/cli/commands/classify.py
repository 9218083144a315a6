"""`vlm classify`: pictures to labels."""

from __future__ import annotations

from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlm.cli.options import DUAL_MODEL, Command, Place, Shared, chosen_device, names
from vlm.settings import option

if TYPE_CHECKING:
    from vlm.siglip.templates import Templates

TemplateSet = Literal["none", "imagenet", "openai", "best", "photo"]


def probability(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        raise ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}") from None
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"expected a number from 0 to 1, got {value:g}")
    return value


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Labels"""

    labels: str | None = option("the labels, with commas between", default=None, metavar="A,B", either="labels")
    labels_file: Path | None = option(
        "a file of labels: one a line, or a JSON list", default=None, metavar="FILE", either="labels"
    )
    template: list[str] | None = option(
        "the text of a label, with {} where it stands; given more than once, the embeddings are averaged",
        default=None,
        metavar="TEXT",
        either="templates",
        single=True,
    )
    templates: TemplateSet | None = option(
        "texts by name: none, the label alone; imagenet, the 81 of SigLIP's published figures; openai, CLIP's 80; best,"
        " its 7 that do as well, and the label; photo, transformers' one",
        default=None,
        either="templates",
        shown="none, or the calibration's",
    )
    no_cache: bool = option("embed the labels anew; by default many labels are kept in ~/.cache/vlm", default=False)


@dataclass(frozen=True, kw_only=True)
class Calibrating:
    """Calibrated probabilities"""

    calibrate: str | None = option(
        'fit a temperature and a bias on this JSONL of {"image": ..., "label": ...} or "labels": [...]; without SOURCE'
        " nothing else is done",
        default=None,
        metavar="JSONL",
    )
    calibration: Path | None = option(
        "the fitted numbers: used, or with --calibrate written here",
        default=None,
        metavar="FILE",
        shown="with --calibrate: calibration.json",
    )


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared
    labels: Labels
    calibrating: Calibrating
    place: Place
    sources: list[str] = option(
        "pictures: files, folders, JSONL, tar shards; - reads paths or JSON lines from stdin",
        place=True,
        metavar="SOURCE",
        default=(),
        shown="",
    )
    model: str = option(
        "model directory or hub id with both towers; demo-siglip is the package's, of drawn scenes",
        default=DUAL_MODEL,
        flags=("-m",),
    )
    image_root: str | None = option(
        "folder of the images that JSON lines name", default=None, metavar="DIR", shown="the file's own"
    )
    top: int | None = option(
        "only the K best labels", default=None, metavar="K", least=1, shown="all with --json, else 5"
    )
    threshold: float = option(
        "only labels that are at least so probable: none, one or several a picture",
        default=0.0,
        metavar="P",
        shown="",
        parse=probability,
    )
    batch_size: int = option("pictures at a time", default=32, metavar="N", least=1)
    json: bool = option("print one JSON object per picture, errors included", default=False)


def run(options: Options) -> int:
    """One line per picture on stdout, printed by `vlm.cli.classifying`."""
    from vlm.cli.classifying import Asked, answer

    return answer(
        Asked(
            sources=options.sources,
            model=options.model,
            labels=_labels(options.labels),
            templates=_templates(options.labels),
            image_root=options.image_root,
            labelled=options.calibrating.calibrate,
            calibration=options.calibrating.calibration,
            top=options.top,
            threshold=options.threshold,
            batch_size=options.batch_size,
            device=chosen_device(options.place.device),
            dtype=options.place.dtype,
            cache=not options.labels.no_cache,
            as_json=options.json,
        )
    )


def _labels(own: Labels) -> list[str]:
    from vlm.siglip.labels import checked, read_labels

    if own.labels_file is not None:
        return read_labels(own.labels_file)
    return [] if own.labels is None else checked(names(own.labels), "--labels")


def _templates(own: Labels) -> Templates | None:
    from vlm.siglip.templates import given, named

    if own.template is not None:
        return given(own.template)
    return None if own.templates is None else named(own.templates)


COMMAND = Command(
    name="classify",
    help="pictures to labels, with a SigLIP or CLIP",
    details=(
        "SigLIP's probabilities are each label's own: none may fit, or several. CLIP's are of one label among those"
        " given. Pictures that cannot be read are named on stderr, the others are classified (exit code 3)."
    ),
    options=Options,
    run=run,
    group="use",
)
