"""Options of `vlm eval` for a model of two towers, and what of the others it does not read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vlm.errors import ConfigError
from vlm.settings import option


@dataclass(frozen=True, kw_only=True)
class Towers:
    """Of tasks of two towers"""

    protocol: Literal["plain", "paper"] | None = option(
        "paper: as SigLIP's published figures were made, 81 templates, canonical names, pictures resized to"
        " size / 0.875 and the middle cut out; plain: the model's own processor and the names as they are",
        default=None,
        shown="the task's own",
    )
    templates: str | None = option(
        "texts around a class name, by name: imagenet, none, ...", default=None, metavar="NAME", either="text"
    )
    template: str | None = option(
        'one text around a class name, as "a photo of a {}."', default=None, metavar="TEXT", either="text"
    )
    class_names: Path | None = option(
        "names of the classes: a line each, `label<TAB>name`, or names alone in the order of the labels",
        default=None,
        metavar="FILE",
        shown="the labels",
    )
    train: Path | None = option(
        "pictures with classes that knn and linear learn from; in a folder DATA/train they are found",
        default=None,
        metavar="PATH",
    )
    features: Literal["pooled", "mean"] | None = option(
        "what knn and linear read: the embedding, or the mean of the patch features",
        default=None,
        shown="the embedding if there is one",
    )
    neighbours: int | None = option("neighbours of knn", default=None, metavar="N", least=1, shown="20")

    def chosen(self) -> dict[str, Any]:
        """What was given, as `vlm.eval.towers.job.Options` names it. Raises ConfigError for a template without {}."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if self.template is not None and "{" not in self.template:
            raise ConfigError(f"--template {self.template!r} has no place for the class; write {{}} where it stands")
        if (text := given.pop("template", None)) is not None:
            given["templates"] = text
        return given


def flags(names: Any) -> str:
    """Names of fields as options: `class_names` -> `--class-names`."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def refuse(given: Any, why: str) -> None:
    """Raise ConfigError where options were given that would not be read."""
    if given:
        raise ConfigError(f"{flags(given)}: not read {why}; leave {'it' if len(given) == 1 else 'them'} out")
