"""`vlm classify --calibrate`: labelled pictures to a temperature and a bias, what they change, and their file."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.data.collection import Entry, entries_of
from vlm.data.problems import Problem, Refused
from vlm.errors import DataError
from vlm.siglip.labels import labels_of
from vlm.words import columns, listed, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlm.cli.told import Told
    from vlm.siglip.calibrated import Calibrated
    from vlm.siglip.calibration import Report

FEW = 256
"""Fewer pictures are scored without a word."""


@dataclass(frozen=True)
class Labelled:
    """Pictures with their labels, from the file `path`."""

    path: str
    entries: list[Entry] = field(default_factory=list)
    labels: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Every label once, in the order of the alphabet."""
        return sorted({label for labels in self.labels for label in labels})


def read_labelled(path: str, image_root: str | None, known: Sequence[str], told: Told) -> Labelled:
    """The lines of a JSONL file that say what is in a picture; the others are told.

    Args:
        known: the labels that there are; none: whatever the lines say.

    Raises:
        DataError: a label that is not known, or no picture with labels.
    """
    result = Labelled(path)
    for one in entries_of([path], image_root=image_root):
        if isinstance(one, Problem):
            told.problem(one)
            continue
        try:
            labels = labels_of(one.info)
        except Refused as refused:
            told.refused(one.id, refused.code, f"{shown(one.id)}: {refused}")
            continue
        result.entries.append(one)
        result.labels.append(labels)
    if not result.entries:
        raise DataError(f'{path}: no picture with labels; expected lines of {{"image": ..., "label": ...}}')
    unknown = [name for name in result.names if known and name not in known]
    if unknown:
        raise DataError(f"{path}: labels that are not among those given: {listed(unknown)}; give them too")
    return result


def calibrate(classifier: Any, labelled: Labelled, path: Path, told: Told) -> tuple[Calibrated, Report]:
    """Fit, and write what was fitted to `path`.

    Args:
        classifier: a `vlm.cli.classifying.Classifier`.

    Raises:
        DataError: no picture can be read, or nothing can be fitted. DiskError: the file cannot be written.
    """
    import torch

    from vlm.generation.progress import Progress
    from vlm.siglip import calibrated, calibration

    places, scored = [], [torch.zeros(0, len(classifier.names))]
    images = ((number, entry.image) for number, entry in enumerate(labelled.entries))
    total = len(labelled.entries)
    with Progress(total, label="labelled pictures", visible=total >= FEW) as progress:
        for batch in classifier.classified(images, None):
            places += batch.keys
            scored.append(batch.logits)
            for number, error in batch.bad:
                told.refused(labelled.entries[number].id, error.code, str(error))
            progress.advance(len(batch.keys) + len(batch.bad))
    told.good += len(places)
    if not places:
        raise DataError(f"{labelled.path}: none of its pictures can be read")
    truth = torch.tensor([[name in labelled.labels[place] for name in classifier.names] for place in places])
    objective: calibration.Objective = "sigmoid" if classifier.model.objective.biased else "softmax"
    report = calibration.calibrate(torch.cat(scored).numpy(), truth.numpy(), objective)
    kept = calibrated.Calibrated(report.calibration, classifier.templates, tuple(classifier.names), classifier.space)
    calibrated.write(path, kept, report)
    return kept, report


def tell(report: Report, path: Path, *, as_json: bool, results_follow: bool) -> None:
    """What a calibration changes: on stdout, or on stderr where results of pictures follow on stdout."""
    out = sys.stderr if results_follow else sys.stdout
    if report.calibration.bounded:
        print(f"warning: {report.calibration.bounded}", file=sys.stderr)
    if as_json:
        print(json.dumps({"calibration": str(path), **asdict(report)}), file=out)
        return
    names = {"ece_top": "calibration error, best label", "ece_pairs": "calibration error, all labels", "nll": "loss"}
    before, after = asdict(report.before), asdict(report.after)
    rows = [[name, f"{before[key]:.4f}", f"{after[key]:.4f}"] for key, name in names.items()]
    print(columns([["", "before", "after"], *rows]), file=out)
    found = report.calibration
    bias = f", bias {found.bias:.4g}" if found.objective == "sigmoid" else ""
    measured = f"on pictures that the fit has not seen ({report.folds} parts in turn)"
    if not report.folds:
        measured = "on the pictures of the fit itself, which flatters: too few to set some aside"
    fitted = f"fitted on {report.num_images} pictures, {report.num_labels} labels"
    print(f"temperature {found.temperature:.4g}{bias}, {fitted}; after: {measured}", file=out)
    print(f"{path}: give it as --calibration", file=out)
