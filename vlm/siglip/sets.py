"""Labelled images and words for classes, before a tower is asked: what has to hold of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vlm.data.examples import Labelled
from vlm.errors import ConfigError, DataError


def check_ids(test: Sequence[Labelled]) -> None:
    """Raise `DataError` unless each id occurs once."""
    twice = [name for name, count in Counter(item.id for item in test).items() if count > 1]
    if twice:
        raise DataError(f"ids occur more than once among the test images: {', '.join(twice[:10])}")


def check_sets(train: Sequence[Labelled], test: Sequence[Labelled], k: int) -> None:
    """Raise what `probe` would raise for its images and `k` before it looks at any."""
    if k < 1:
        raise ConfigError(f"k is {k}, expected at least 1 neighbour")
    if not train or not test:
        raise DataError(f"a probe needs images to learn from and others to test, got {len(train)} and {len(test)}")
    if len({item.label for item in train}) < 2:
        raise DataError(
            f"all {len(train)} training images have the label {train[0].label!r}; give at least two classes"
        )
    check_ids(test)


def images_in_both(train: Sequence[Labelled], test: Sequence[Labelled]) -> int:
    """Image files that are in both sets: their test answers may be learnt by heart."""
    one, other = ({item.image for item in items if isinstance(item.image, Path)} for items in (train, test))
    return len(one & other)


def check_templates(templates: Sequence[str]) -> None:
    """Raise `DataError` unless each text has one place for the class."""
    bad = [template for template in templates if template.count("{}") != 1]
    if bad or not templates:
        raise DataError(f"templates need the place of the class, {{}}, exactly once; got {bad or list(templates)}")
