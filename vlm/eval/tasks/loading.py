"""From a task and its official files to examples: the one place where a task meets the readers of `vlm.data`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from vlm import registry
from vlm.data import reading
from vlm.data.examples import Example
from vlm.data.items import Item
from vlm.data.source import Source
from vlm.errors import ConfigError, DataError, nearest
from vlm.eval.tasks.task import Task as Facts
from vlm.eval.tasks.task import fill
from vlm.words import listed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Task(Facts):
    """A benchmark, and its examples from the official files."""

    def load(self, root: Path, split: str | None = None, limit: int | None = None) -> list[Example]:
        """The items of a split, from the official files below `root`.

        Images that are not there stay in the list (the harness counts them as wrong) and are counted in a warning.

        Args:
            root: the folder that all of its paths are relative to.
            split: name of a split; its own default for None.
            limit: only the first so many items.

        Raises:
            ConfigError: an unknown split or format, or a prompt that names a field the loader does not give.
            DataError: a file that is missing (the message says what to download, and to where) or not as the format
                says; no image of the split is there.
        """
        chosen = self.split(split)
        source = Source(self.name, split or self.default_split, Path(root), chosen.files, chosen.options)
        items = islice(reader(self.format)(source), limit)
        file = str(source.place(next(iter(chosen.files))))
        examples = [_example(self, item, file, number) for number, item in enumerate(items, 1)]
        if not examples:
            raise DataError(f"task {self.name!r}, split {source.split!r}: no item in {file}")
        _report_missing(self, examples, source)
        return examples


def reader(format: str) -> Callable[[Source], Iterator[Item]]:
    """What reads the files of exactly this format. Raises ConfigError that names the nearest."""
    annotated, official = reading.formats(), registry.kinds("vlm.data.benchmarks")
    known = sorted({*annotated, *official})
    if format not in known:
        raise ConfigError(f"unknown format {format!r}{nearest(format, known)}; known: {', '.join(known)}")
    if format in annotated:
        return partial(_annotated, format)
    return partial(_official, registry.part("vlm.data.benchmarks", format).read)


def _official(read: Callable[[Source], Iterator[Item]], source: Source) -> Iterator[Item]:
    """What the official script scores of a split. Raises DataError for an item without gold text."""
    for item in read(source):
        if not item.references and not item.answers:
            raise DataError(
                f"task {source.task!r}, split {source.split!r}: item {item.id!r} has no gold text; is this a file of "
                "the hidden test split?"
            )
        if not item.left_out:
            yield item


def _annotated(format: str, source: Source) -> Iterator[Item]:
    """The examples of the file `data`, images below the folder `images` or the file's own; the field is `prefix`."""
    images = source.path("images") if source.has("images") else None
    examples, _ = reading.read(source.path("data"), format, image_root=images, require=())
    for example in examples:
        yield Item(
            id=example.id,
            images=example.images,
            fields={"prefix": example.prefix},
            suffix=example.suffix,
            references=example.references,
            answers=example.answers,
            info=example.info,
        )


def _example(task: Facts, item: Item, file: str, number: int) -> Example:
    shown = item.shown
    return Example(
        id=item.id,
        image=shown.images[0] if shown.images else None,
        prefix=fill(task.prompt, shown.fields, where=f"task {task.name!r}, item {item.id!r}"),
        suffix=item.suffix,
        references=item.references,
        answers=item.answers,
        file=file,
        line=number,
        more_images=shown.images[1:],
        info=item.info,
    )


def _report_missing(task: Facts, examples: Sequence[Example], source: Source) -> None:
    paths = {image for ex in examples for image in ex.images if isinstance(image, Path)}
    missing = sorted(path for path in paths if not path.is_file())
    if not missing:
        return
    where = "; ".join(
        f"{source.place(role)} from {file.url}"
        for role, file in source.files.items()
        if file.url and role.startswith("images")
    )
    hint = f"; images belong in {where}" if where else ""
    some = listed(missing, 5)
    text = f"task {task.name!r}, split {source.split!r}: {len(missing)} of {len(paths)} images are missing"
    if len(missing) == len(paths):
        raise DataError(f"{text}: {some}{hint}")
    logger.warning("%s and count as wrong: %s%s", text, some, hint)
