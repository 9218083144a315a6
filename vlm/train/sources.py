"""The annotation files that a run trains on and is validated on, read before anything else."""

import logging
from collections.abc import Sequence
from pathlib import Path

from vlm import ranks
from vlm.data import content
from vlm.data.control import without_control
from vlm.data.examples import Example
from vlm.data.problems import Problem, listing
from vlm.data.reading import read
from vlm.errors import DataError
from vlm.train.config import RunConfig

log = logging.getLogger(__name__)


def read_sources(config: RunConfig, skip_bad: bool) -> tuple[list[Example], tuple[int, ...], int]:
    """All training examples, how many came from each file, and how many annotations were skipped.

    Raises `DataError` with the problems of all files together.
    """
    examples: list[Example] = []
    counts, problems, skipped = [], [], 0
    for source in config.data.sources():
        try:
            own, bad = read(source.path, image_root=source.image_root, require=("suffix",), skip_bad=skip_bad)
        except DataError as error:
            problems.append(str(error))
            continue
        if not own:
            problems.append(f"{source.path}: no usable example")
        tell_skipped(bad)
        own = _without_control(own, config)
        examples += own
        counts.append(len(own))
        skipped += len(bad)
    if problems:
        raise DataError("\n".join(problems))
    if skipped:
        log.warning("%d annotations skipped, %d kept", skipped, len(examples))
    return examples, tuple(counts), skipped


def read_val(config: RunConfig, skip_bad: bool) -> tuple[list[Example], int]:
    """The validation examples, and how many annotations were skipped."""
    if config.data.val is None:
        return [], 0
    root = config.data.image_root
    examples, bad = read(config.data.val, image_root=root, require=("suffix",), skip_bad=skip_bad)
    tell_skipped(bad)
    return _without_control(examples, config), len(bad)


def _without_control(examples: list[Example], config: RunConfig) -> list[Example]:
    return without_control(examples, "`strip_control: true` under `data`", strip=config.data.strip_control)


def tell_skipped(problems: Sequence[Problem]) -> None:
    """List the annotations that `--skip-bad` leaves out."""
    for line in listing(problems):
        log.warning("skipped %s", line)


def data_digest(examples: list[Example]) -> str:
    """sha256 over what is trained on, in order: texts and the content of images, so that data may move.

    The processes of a run share the reading; each must call this.
    """
    found: dict[Path, str] = {}
    for part in ranks.current().gather(content.of_files(ranks.current().share(content.image_files(examples)))):
        found |= part
    return content.of_items(examples, ("id", "prefix", "suffix"), found)
