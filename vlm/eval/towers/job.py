"""What an evaluation of two towers is asked: its options, and a task with its data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from vlm.eval.towers.benchmark import Chosen, Protocol
from vlm.eval.towers.contract import Features, Picture, View
from vlm.eval.towers.data import Pool, Sets, check_learnt, pairs_of, sets_of


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model of two towers is evaluated.

    Attributes:
        protocol: `paper`: as SigLIP's published zero-shot figures were made (the 81 templates of CLIP, canonical names,
            the first of several; pictures resized to size / 0.875, the middle cut out); `plain`: the model's own
            processor, names as they are. "": the task's own.
        templates: of zero-shot: a name (`imagenet`, `none`) or one template with `{}`. "": the protocol's.
        features: of k-NN and the linear probe. "": the embedding, where the model has one.
        train: pictures they learn from. class_names: the file of `data.class_names`.
        neighbours: of k-NN.
        image_root: of a JSONL file. limit: only the first so many pictures of each task.
        shuffle_images: the control that shows what chance gives: each item gets another item's picture (`seed`).
    """

    protocol: Protocol | str = ""
    templates: str = ""
    features: Features | Literal[""] = ""
    train: Path | None = None
    class_names: Path | None = None
    neighbours: int = 20
    batch_size: int = 32
    image_root: Path | None = None
    limit: int | None = None
    shuffle_images: bool = False
    seed: int = 0
    report: bool = True
    progress: bool = True


@dataclass(frozen=True)
class Job:
    """A task with its data, and how it is done."""

    one: Chosen
    data: Sets | list[Pool]
    options: Options
    source: str
    """Where the data came from, for people."""

    @property
    def protocol(self) -> Protocol:
        """The one that was asked for, or the task's own."""
        return "paper" if (self.options.protocol or self.one.task.protocol) == "paper" else "plain"

    @property
    def view(self) -> View:
        """Pictures of retrievals are read plainly in both protocols, as in big_vision's evaluation."""
        return "plain" if self.one.task.kind == "retrieval" else self.protocol

    @property
    def features(self) -> Features:
        """The embedding beside texts, but for probes that were asked to read others."""
        return (self.options.features or "pooled") if self.one.task.kind in ("knn", "linear") else "pooled"

    @property
    def pictures(self) -> list[tuple[str, Picture]]:
        """(id, picture) of every one that is judged or learnt from."""
        if isinstance(self.data, Sets):
            learnt = self.data.train if self.one.task.kind in ("knn", "linear") else ()
            return [(item.id, item.image) for item in (*self.data.test, *learnt)]
        return [pair for pool in self.data for pair in zip(pool.ids, pool.images, strict=True)]


def read(one: Chosen, data: Path, options: Options) -> Job:
    """A task with its data. Raises ConfigError and DataError as `pairs_of` and `sets_of`."""
    source = f"{one.label} below {data}" if one.task.splits else str(data)
    return Job(one, _data(one, data, options), options, source)


def _data(one: Chosen, data: Path, options: Options) -> Sets | list[Pool]:
    if one.task.kind == "retrieval":
        found = pairs_of(one, data, image_root=options.image_root, limit=options.limit)
        return [_turned_pool(pool, options.seed) for pool in found] if options.shuffle_images else found
    sets = sets_of(
        one, data, train=options.train, names=options.class_names, image_root=options.image_root, limit=options.limit
    )
    if one.task.kind in ("knn", "linear"):
        check_learnt(one.label, sets, options.neighbours)
    return _turned_sets(sets, options.seed) if options.shuffle_images else sets


def _turned_pool(pool: Pool, seed: int) -> Pool:
    """Every caption belongs to another picture than its own."""
    order = np.random.default_rng(seed).permutation(len(pool.ids))
    turned = np.empty_like(order)
    turned[order] = np.roll(order, 1)
    return replace(pool, images=tuple(pool.images[place] for place in turned))


def _turned_sets(sets: Sets, seed: int) -> Sets:
    order = np.random.default_rng(seed).permutation(len(sets.test))
    turned = np.empty_like(order)
    turned[order] = np.roll(order, 1)
    test = tuple(replace(item, image=sets.test[place].image) for item, place in zip(sets.test, turned, strict=True))
    return replace(sets, test=test)
