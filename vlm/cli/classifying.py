"""`vlm classify`: labels of pictures, as they are scored."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.cli import console
from vlm.cli.calibrating import calibrate, read_labelled, tell
from vlm.cli.told import Told
from vlm.data.collection import Entry, entries_of
from vlm.data.problems import Problem
from vlm.errors import ConfigError
from vlm.siglip.labels import check_texts
from vlm.siglip.templates import TEMPLATES, Templates, prompts
from vlm.words import aligned, listed, shown

if TYPE_CHECKING:
    from torch import Tensor

    from vlm.siglip.calibrated import Calibrated
    from vlm.siglip.classifying import Classified

SHOWN = 5
"""So many labels of a picture are printed where --top does not say."""
FEW = 256
"""Fewer texts are embedded without a word."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is classified, and how.

    Attributes:
        sources: as `vlm.data.collection` takes them.
        labels: empty: those of the labelled pictures.
        templates: None: those of the calibration, else the label alone.
        labelled: a file of pictures to calibrate on.
        calibration: a file that is read, or written where there are labelled pictures.
        cache: whether embeddings of labels are kept from one call to the next.
    """

    sources: Sequence[str]
    model: str
    labels: Sequence[str]
    templates: Templates | None = None
    image_root: str | None = None
    labelled: str | None = None
    calibration: Path | None = None
    top: int | None = None
    threshold: float = 0.0
    batch_size: int = 32
    device: str = "cpu"
    dtype: str = "auto"
    cache: bool = True
    as_json: bool = False


def answer(asked: Asked) -> int:
    """Do what is asked; returns the exit code. Options and paths are looked at before a model is opened."""
    if not asked.sources and asked.labelled is None:
        raise ConfigError("nothing to classify: give pictures as SOURCE, or labelled ones as --calibrate JSONL")
    told = Told(asked.as_json)
    kept = _read(asked.calibration) if asked.labelled is None else None
    labelled = None
    if asked.labelled is not None:
        labelled = read_labelled(asked.labelled, asked.image_root, asked.labels, told)
    names = list(asked.labels) or ([] if labelled is None else labelled.names)
    if not names:
        raise ConfigError("no labels: give --labels cat,dog or --labels-file FILE")
    coming = _from_the_first(entries_of(asked.sources, image_root=asked.image_root), told)
    if coming is None and labelled is None:
        if not told.bad:
            raise ConfigError("nothing to classify: the sources are empty")
        return told.code()
    classifier = Classifier(asked, names, asked.templates or (TEMPLATES["none"] if kept is None else kept.templates))
    if labelled is not None:
        path = asked.calibration or Path("calibration.json")
        kept, report = calibrate(classifier, labelled, path, told)
        tell(report, path, as_json=asked.as_json, results_follow=bool(asked.sources))
    elif kept is not None:
        _check(kept, classifier)
    if coming is not None:
        _classify(classifier, kept, coming, told)
    return told.code()


def _read(path: Path | None) -> Calibrated | None:
    if path is None:
        return None
    from vlm.siglip.calibrated import read

    return read(path)


def _check(kept: Calibrated, classifier: Classifier) -> None:
    kept.check(classifier.templates, classifier.space, str(classifier.asked.calibration))
    if set(kept.labels) != set(classifier.names):
        said = f"the calibration was fitted on other labels ({listed(kept.labels, 5)}): its bias is how often those fit"
        print(f"warning: {said}", file=sys.stderr)


def _from_the_first(found: Iterator[Entry | Problem], told: Told) -> Iterator[Entry | Problem] | None:
    """What is found from the first that can be looked at on; None where there is nothing: a wrong path should not take
    the seconds of opening a model to say so."""
    for one in found:
        if isinstance(one, Entry):
            return chain([one], found)
        told.problem(one)
    return None


class Classifier:
    """A model with its labels.

    Attributes:
        model, processor: as `vlm.siglip.load` opens them.
        names, templates: the labels, and how they become texts.

    Raises:
        ConfigError, CheckpointError, DataError: the model cannot be opened, or the labels mean nothing to it.
    """

    def __init__(self, asked: Asked, names: Sequence[str], templates: Templates) -> None:
        from vlm.siglip.loading import load

        console.quiet_transformers()
        self.asked, self.names, self.templates = asked, list(names), templates
        self.model, self.processor = load(asked.model, device=asked.device, dtype=asked.dtype)
        if not self.model.objective.biased and len(self.names) < 2:
            raise ConfigError(
                f"{asked.model}: its probabilities are of one label among those given (softmax): of a single label they"
                f" are 100% for every picture; give two or more"
            )
        if not self.model.objective.biased and asked.threshold:
            said = "probabilities of this model add up to 100% over the labels: they compete, and few can pass"
            print(f"warning: --threshold: {said}", file=sys.stderr)
        self._groups = prompts(self.names, templates)
        check_texts(self.names, self._groups, self.processor.rule.clean)

    @cached_property
    def space(self) -> dict[str, Any]:
        """What decides the embeddings (`vlm.siglip.space`); reads all weights."""
        from vlm.siglip import space

        return space.of(self.model, self.processor)

    @cached_property
    def classes(self) -> Tensor:
        """float32[C, D]."""
        from vlm.generation.progress import Progress
        from vlm.siglip.class_cache import ClassCache, default_folder, worth_keeping
        from vlm.siglip.classes import class_embeddings

        total, folder, cache = sum(map(len, self._groups)), default_folder(), None
        if self.asked.cache and folder is not None and worth_keeping(total, self.model.device):
            cache = ClassCache(folder, lambda: self.space)
        with Progress(total, label="embedding labels", visible=total >= FEW) as progress:
            return class_embeddings(self.model, self.processor, self._groups, cache=cache, advance=progress.advance)

    def classified(self, images: Iterator[tuple[Any, Any]], kept: Calibrated | None) -> Iterator[Classified]:
        """Batches of scored pictures."""
        from vlm.siglip.classifying import classify

        calibration = None if kept is None else kept.calibration
        size = self.asked.batch_size
        return classify(self.model, self.processor, images, self.classes, calibration=calibration, batch_size=size)


# --- labels of pictures -----------------------------------------------------------------------------------------------


def _classify(classifier: Classifier, kept: Calibrated | None, coming: Iterator[Entry | Problem], told: Told) -> None:
    def images() -> Iterator[tuple[str, Any]]:
        for one in coming:
            if isinstance(one, Problem):
                told.problem(one)
            else:
                yield one.id, one.image

    for batch in classifier.classified(images(), kept):
        rows = [_ranked(classifier, batch, number) for number in range(len(batch.keys))]
        told.good += len(rows)
        if classifier.asked.as_json:
            for name, labels in zip(batch.keys, rows, strict=True):
                print(json.dumps({"image": name, "labels": labels}), flush=True)
        elif rows:
            print("\n".join(_in_columns(batch.keys, rows)), flush=True)
        for name, error in batch.bad:
            told.refused(name, error.code, str(error))


def _ranked(classifier: Classifier, batch: Classified, number: int) -> list[dict[str, Any]]:
    from vlm.siglip.classifying import ranked

    asked = classifier.asked
    top = asked.top or (None if asked.as_json else SHOWN)
    scores = batch.logits[number], batch.probabilities[number]
    found = ranked(classifier.names, *scores, top=top, threshold=asked.threshold)
    return [{"label": one.label, "probability": _short(one.probability), "logit": _short(one.logit)} for one in found]


def _short(value: float) -> float:
    """A float32 in the digits that it has."""
    return float(f"{value:.7g}")


def _in_columns(names: Sequence[str], rows: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """A line for each picture: its name, then labels with their probabilities; `none` where none passes."""
    texts = [[f"{one['label']} {_percent(one['probability'])}" for one in row] or ["none"] for row in rows]
    width = max(map(len, texts))
    return aligned([[shown(name), *row, *[""] * (width - len(row))] for name, row in zip(names, texts, strict=True)])


def _percent(probability: float) -> str:
    return f"{probability:.1%}" if probability >= 0.0005 else "<0.1%"
