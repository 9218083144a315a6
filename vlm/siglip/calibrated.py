"""A calibration in a file: for one model and the templates that it was fitted with, and refused with any other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from vlm.data import strictjson
from vlm.errors import ConfigError, DataError
from vlm.files import write_json
from vlm.siglip.calibration import Calibration, Objective, Report
from vlm.siglip.space import SIDES, apart
from vlm.siglip.templates import Templates

KIND = "vlm calibration 1"
_EXPECTED = "expected a file that `vlm classify --calibrate` wrote"


@dataclass(frozen=True)
class Calibrated:
    """What a file holds.

    Attributes:
        templates: how the labels became texts.
        labels: those it was fitted on.
        space: of the model, as `vlm.siglip.space.of`.
    """

    calibration: Calibration
    templates: Templates
    labels: tuple[str, ...]
    space: Mapping[str, Any]

    def check(self, templates: Templates, space: Mapping[str, Any], where: str) -> None:
        """Raise `ConfigError`, naming what differs, unless it is for this model and these templates."""
        differ = apart(self.space, space)
        if (self.templates.texts, self.templates.canonical) != (templates.texts, templates.canonical):
            differ.append(f"templates: there {self.templates.name}, now {templates.name}")
        if differ:
            raise ConfigError(
                f"{where}: a calibration of another model or of other templates says nothing about this one:"
                f" {'; '.join(differ)}; use that one, or fit again with --calibrate"
            )


def write(path: str | Path, kept: Calibrated, report: Report) -> None:
    """Write what was fitted, and beside it what it changed, in one step. Raises `DiskError`."""
    value = {
        "kind": KIND,
        **asdict(kept.calibration),
        "templates": {**asdict(kept.templates), "texts": list(kept.templates.texts)},
        "labels": list(kept.labels),
        "measured": {key: value for key, value in asdict(report).items() if key != "calibration"},
        "space": {key: value for key, value in kept.space.items() if key not in SIDES},
    }
    write_json(path, value)


def read(path: str | Path) -> Calibrated:
    """A file of `write`.

    Raises:
        DataError: the file cannot be read, or is another one.
    """
    try:
        value = strictjson.parse(strictjson.read_bytes(path))
    except strictjson.NotJSON as error:
        raise DataError(f"{path}: {error.in_words()}; {_EXPECTED}") from error
    if not isinstance(value, dict) or value.get("kind") != KIND:
        raise DataError(f"{path}: no calibration; {_EXPECTED}")
    try:
        temperature, bias = float(value["temperature"]), float(value["bias"])
        if not 0 < temperature < math.inf or not math.isfinite(bias) or value["objective"] not in get_args(Objective):
            raise ValueError("temperature, bias or objective")
        templates = value["templates"]
        return Calibrated(
            Calibration(value["objective"], temperature, bias, str(value["bounded"])),
            Templates(str(templates["name"]), tuple(map(str, templates["texts"])), bool(templates["canonical"])),
            tuple(map(str, value["labels"])),
            dict(value["space"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: a damaged calibration ({error}); {_EXPECTED}") from error
