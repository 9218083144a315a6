"""Evaluate a model of two towers: embed every picture and text once, rank, write results and a page.

    from vlm import siglip
    from vlm.siglip.embedder import Embedder

    outcome = evaluate_towers(Embedder(*siglip.load("M"), name="M"), "zeroshot,retrieval", "DATA", "runs/x/eval")
    print(table(outcome))

Into OUT go `vectors/` (as they are made; a killed run goes on where it stopped) and a folder for each task with
`items.jsonl` (every query with what was found), `results.json` and `report.html`; over all tasks OUT has the last two.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm import ranks
from vlm.errors import ConfigError, ImageError
from vlm.eval import overview, results
from vlm.eval.items import ITEMS, REPORT, RESULTS
from vlm.eval.towers import page, probing
from vlm.eval.towers.benchmark import Chosen, chosen, facts
from vlm.eval.towers.contract import Embedder
from vlm.eval.towers.data import Sets
from vlm.eval.towers.job import Job, Options, read
from vlm.eval.towers.scored import Rows, Scored, retrieval, zero_shot
from vlm.eval.towers.vectors import FOLDER, Kept, embed_images, embed_texts, keys_of, text_key
from vlm.files import write_json, write_lines

logger = logging.getLogger(__name__)


def evaluate_towers(
    embedder: Embedder,
    tasks: str | Sequence[Chosen],
    data: str | Path,
    out: str | Path,
    *,
    options: Options | None = None,
) -> dict[str, Any]:
    """Evaluate on tasks. Started again with the same settings it goes on where it stopped.

    A picture that cannot be decoded counts as wrong; it is listed in the results and never leaves the denominator.

    Args:
        tasks: names as in `zeroshot,knn` or `imagenet`, or what `benchmark.chosen` gives.
        data: a folder or file of one's own, or the folder that holds the official files.
        out: the results of a task go into OUT/TASK.

    Returns:
        `{"tasks": {name: results}, "skipped": number}`.

    Raises:
        ConfigError: settings that do not fit together, or OUT holds vectors of other settings.
        DataError: data that are missing or not as they should be; no picture could be decoded.
    """
    options = options or Options()
    if not options.features and not embedder.pools:
        options = replace(options, features="mean")
    picked = chosen(tasks) if isinstance(tasks, str) else list(tasks)
    if not picked:
        raise ConfigError(f"{tasks!r} names no task of two towers (--list-tasks)")
    with ranks.joined() as group:
        if group.world > 1:
            raise ConfigError("a model of two towers is evaluated by one process; start it without torchrun")
    jobs = [read(one, Path(data), options) for one in picked]
    identity = dict(embedder.identity())
    folder = Path(out)
    outcome: dict[str, Any] = {"tasks": {}, "skipped": 0}
    for job in jobs:
        logger.info("%s: %d pictures", job.one.label, len(job.pictures))
        found = _one(job, embedder, identity, folder)
        outcome["tasks"][job.one.label] = found
        outcome["skipped"] += found["skipped"]
    if options.report:
        overview.write(folder / REPORT, outcome, embedder.name)
    write_json(folder / RESULTS, outcome)
    return outcome


def _one(job: Job, embedder: Embedder, identity: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Embed, score, write one task."""
    started = time.monotonic()
    pictures = job.pictures
    keys = keys_of([image for _, image in pictures])
    settings = {"model": identity, "view": job.view, "features": job.features}
    kept = Kept(folder / FOLDER / f"images-{job.view}-{job.features}", settings)
    with kept:
        bad = embed_images(
            embedder,
            kept,
            {key: image for key, (_, image) in zip(keys, pictures, strict=True)},
            batch_size=job.options.batch_size,
            view=job.view,
            features=job.features,
            progress=job.options.progress,
        )
        images = Rows(*kept.rows(keys))
    scored, texts = _scored(job, embedder, identity, folder, images)
    failures = [_failure(name, bad[key]) for key, (name, _) in zip(keys, pictures, strict=True) if key in bad]
    told = {"failures": failures, "seconds": round(time.monotonic() - started, 2), "texts": texts}
    return _write(job, embedder, identity, folder / job.one.label, scored, {**told, "keys": keys})


def _failure(name: str, error: ImageError) -> dict[str, Any]:
    return {"id": name, "code": error.code, "message": str(error)}


def _scored(
    job: Job, embedder: Embedder, identity: Mapping[str, Any], folder: Path, images: Rows
) -> tuple[Scored, dict[str, Any]]:
    """What the vectors are worth, and what was read as text."""
    if isinstance(job.data, Sets) and job.one.task.kind != "zeroshot":
        scored, settings = probing.probe(job.one.task.kind, job.data, images, job.options.neighbours)
        return scored, {"features": job.features, **settings}
    if isinstance(job.data, Sets):
        names = [name.partition(",")[0] if job.protocol == "paper" else name for name in job.data.names]
        templates = job.options.templates or ("imagenet" if job.protocol == "paper" else "")
        groups = embedder.prompts(names, templates, canonical=job.protocol == "paper")
        rows, cut = _texts(embedder, identity, folder, groups, job.options)
        notes = [*_shared(job.data.labels, groups), *_told_cut(cut)]
        told = {"classes": len(groups), "templates": len(groups[0]), "first_class": list(groups[0])[:3]}
        return zero_shot(job.data.test, images, rows, job.data.labels, notes), told
    flat = [text for pool in job.data for text in pool.texts]
    rows, cut = _texts(embedder, identity, folder, [(text,) for text in flat], job.options)
    ends = np.cumsum([0, *(len(pool.texts) for pool in job.data)])
    stops = np.cumsum([0, *(len(pool.ids) for pool in job.data)])
    parts = [
        [of.take(np.arange(edges[place], edges[place + 1])) for place in range(len(job.data))]
        for of, edges in ((images, stops), (rows, ends))
    ]
    scored = retrieval(job.data, *parts)
    return _with_notes(scored, _told_cut(cut)), {"texts": len(flat), "texts_cut": cut}


def _with_notes(scored: Scored, notes: Sequence[str]) -> Scored:
    first, *others = scored.metrics
    return replace(scored, metrics=[replace(first, notes=(*first.notes, *notes)), *others])


def _texts(
    embedder: Embedder, identity: Mapping[str, Any], folder: Path, groups: Sequence[tuple[str, ...]], options: Options
) -> tuple[Rows, int]:
    """The vector of each group of texts, and how many groups hold a text that was cut."""
    with Kept(folder / FOLDER / "texts", {"model": identity}) as kept:
        embed_texts(embedder, kept, groups, progress=options.progress)
        keys = [text_key(group) for group in groups]
        return Rows(*kept.rows(keys)), sum(key in kept.cut for key in keys)


def _told_cut(cut: int) -> list[str]:
    return [f"{cut} texts were longer than the text tower reads, and cut"] if cut else []


def _shared(labels: Sequence[str], groups: Sequence[tuple[str, ...]]) -> list[str]:
    """What to say of classes that are the same text: nothing can tell them apart."""
    members: dict[tuple[str, ...], list[str]] = {}
    for label, group in zip(labels, groups, strict=True):
        members.setdefault(group, []).append(label)
    shared = [names for names in members.values() if len(names) > 1]
    if not shared:
        return []
    first = " and ".join(map(repr, shared[0][:3]))
    return [
        f"{sum(map(len, shared))} classes are {len(shared)} texts, as {first}: their pictures are ties and count as"
        " wrong; give each class a name of its own"
    ]


def _write(
    job: Job, embedder: Embedder, identity: Mapping[str, Any], folder: Path, scored: Scored, told: Mapping[str, Any]
) -> dict[str, Any]:
    task = facts(job.one, embedder.name, embedder.tokens)
    own = job.protocol == job.one.task.protocol and not job.options.templates
    outcome = {
        **_figures(scored, told["failures"]),
        "task": {**task, "average_over": scored.average_over, "protocol_is_the_tasks": own},
        "model": {"name": embedder.name, **identity},
        "data": {"source": job.source, "sha256": _digest(job, told["keys"]), "limit": job.options.limit},
        "protocol": {
            "name": job.protocol,
            "ties": "count against",
            **embedder.describe(job.view),
            **told["texts"],
        },
        "images_shuffled_with_seed": job.options.seed if job.options.shuffle_images else None,
        "run": {"batch_size": job.options.batch_size, "seconds": told["seconds"]},
        "versions": results.versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / ITEMS, scored.lines)
    if job.options.report:
        page.write(folder / REPORT, outcome, scored)
    write_json(folder / RESULTS, outcome)  # last: who finds it finds the others complete
    return outcome


def _figures(scored: Scored, failures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "metrics": {one.name: one.summary() for one in scored.metrics},
        "num_items": sum(1 for line in scored.lines if line["kind"] != "text_to_image"),
        "skipped": len(failures),
        "failures": list(failures),
        "skipped_annotations": [],
        "breakdown": {
            name: {one.name: results.by_group(one, groups) for one in scored.metrics}
            for name, groups in scored.groups.items()
        },
    }


def _digest(job: Job, keys: Sequence[str]) -> str:
    """sha256 over ids, pictures, classes and captions: two results about the same data have the same."""
    total = hashlib.sha256(json.dumps([[name for name, _ in job.pictures], list(keys)]).encode())
    if isinstance(job.data, Sets):
        total.update(json.dumps([[item.label for item in job.data.test], job.data.labels]).encode())
    else:
        total.update(json.dumps([[pool.name, pool.texts, pool.owner.tolist()] for pool in job.data]).encode())
    return total.hexdigest()
