"""`vlm eval`: score a model on a file or on tasks."""

import json as jsons
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vlm.cli import console
from vlm.cli.options import (
    Command,
    Place,
    Prompts,
    Reading,
    Shared,
    at_least,
    check_beams,
    check_device,
    chosen_of,
    unless_auto,
)
from vlm.cli.towers import Towers, refuse
from vlm.errors import ConfigError
from vlm.generation.decoding import Decoding
from vlm.settings import option

Chosen = chosen_of(
    *(Decoding, "max_new_tokens", "num_beams", "beam_search", "by", "normalization"),
    unset=True,  # what the task says, or evaluate's own
)


def batch_size(text: str) -> int | Literal["auto"]:
    """A number of items, or `auto`."""
    return "auto" if text == "auto" else at_least(1)(text)


def list_tasks() -> str:
    """The tables of tasks."""
    from vlm.eval.tasks.catalogue import table
    from vlm.eval.towers.benchmark import table as of_towers

    return f"for a model that writes text:\n\n{table()}\n\nfor a model of two towers:\n\n{of_towers()}"


@dataclass(frozen=True, kw_only=True)
class Items:
    """What is evaluated"""

    data: Path = option(
        "annotations, as JSONL; or the folder of the tasks' files; or a folder with one folder per class",
        flags=("-d",),
        metavar="PATH",
    )
    metrics: str | None = option(
        "for a JSONL file: names of metrics, such as exact_match,cider", default=None, metavar="A,B", either="form!"
    )
    tasks: str | None = option(
        "names of tasks, such as vqav2,pope@adversarial, or a YAML file", default=None, metavar="A,B", either="form!"
    )
    list_tasks: bool = option("list the tasks and stop", default=False, prints=list_tasks)
    image_root: Path | None = option(
        "folder of the images", default=None, metavar="DIR", shown="that of the JSONL file"
    )
    limit: int | None = option("only the first N items (of each task)", default=None, metavar="N", least=1)
    skip_bad: bool = option("leave out and list broken annotations of a JSONL file", default=False)
    shuffle_images: bool = option("control: give each item another item's image", default=False)
    seed: int = option("of the shuffling", default=0, metavar="N", least=0)


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared
    items: Items
    decoding: Chosen  # type: ignore[valid-type]  # made from Decoding
    reading: Reading
    prompts: Prompts
    towers: Towers
    place: Place
    model: str = option("model directory or hub id", flags=("-m",))
    out: Path = option("folder for the results", flags=("-o",), metavar="DIR")
    batch: Any = option(
        "items at a time, or auto: the largest power of two that fits into the memory",
        default=16,
        flags=("--batch-size",),
        metavar="N",
        parse=batch_size,
        either="at a time",
    )
    batch_tokens: int | None = option(
        "instead of --batch: as many items at a time as have N image and prompt tokens (NaFlex towers)",
        default=None,
        metavar="N",
        least=1,
        either="at a time",
    )
    json: bool = option("print the results as JSON", default=False)


def run(options: Options) -> int:
    """The table of scores on stdout."""
    from vlm import ranks
    from vlm.eval.tables import table

    evaluate = _way(options)
    check_device(options.place.device)
    console.quiet_transformers()
    with ranks.joined() as group:
        results = evaluate(options)
        if group.main:
            print(jsons.dumps(results, indent=1) if options.json else table(results))
            print(f"written to {options.out}", file=sys.stderr)
        # One process tells it: a launcher takes the first code above 0 for a crash of the whole.
        return console.SKIPPED if results["skipped"] and group.main else console.OK


def _way(options: Options) -> Callable[[Options], dict[str, Any]]:
    """What evaluates: a file, tasks of a model that writes, or tasks of two towers; nothing given stays unread."""
    from vlm.eval.towers.benchmark import chosen

    items, given = options.items, _given(options)
    if items.tasks is not None and chosen(items.tasks):
        refuse([*given, *_set(options.prompts, "strip_control")], "by a model of two towers, which writes nothing")
        refuse([*_set(options.reading, "image_size"), *_set(options, "batch_tokens")], "by a model of two towers")
        refuse(_set(items, "skip_bad"), "with these tasks: every line of a file must be right")
        return _on_towers
    refuse(list(options.towers.chosen()), "but with the tasks of a model of two towers (--list-tasks)")
    if items.tasks is not None and (items.image_root or items.skip_bad):
        raise ConfigError("--image-root and --skip-bad are for a JSONL file; with --tasks the tasks name their files")
    _refuse_unread(given)
    if items.tasks is None:  # a task may say how many beams it takes
        check_beams(given.get("num_beams"), given.get("beam_search"))
        return _on_file
    return _on_tasks


def _set(options: Any, *names: str) -> list[str]:
    """Those of some options that were given."""
    return [name for name in names if getattr(options, name) not in (None, False)]


def _opening(options: Options) -> dict[str, Any]:
    device, dtype = unless_auto(options.place.device), unless_auto(options.place.dtype)
    return {"device": device, "dtype": dtype, "geometry": options.reading.geometry()}


def _on_file(options: Options) -> dict[str, Any]:
    from vlm.eval.harness import evaluate

    items = options.items
    assert items.metrics is not None
    return evaluate(
        options.model,
        items.data,
        items.metrics,
        options.out,
        **_given(options),
        **_opening(options),
        image_root=items.image_root,
        strip_control=options.prompts.strip_control,
        batch_size=options.batch,
        batch_tokens=options.batch_tokens,
        limit=items.limit,
        skip_bad=items.skip_bad,
        shuffle_images=items.shuffle_images,
        seed=items.seed,
    )


def _on_tasks(options: Options) -> dict[str, Any]:
    from vlm.eval.harness import evaluate_tasks
    from vlm.eval.job import Options as Job

    items = options.items
    assert items.tasks is not None
    how = Job(
        batch_size=options.batch,
        batch_tokens=options.batch_tokens,
        shuffle_images=items.shuffle_images,
        seed=items.seed,
    )
    return evaluate_tasks(
        options.model,
        items.tasks,
        items.data,
        options.out,
        **_opening(options),
        options=how,
        limit=items.limit,
        decoding=_given(options),
        strip_control=options.prompts.strip_control,
    )


def _on_towers(options: Options) -> dict[str, Any]:
    from vlm.cli.options import chosen_device
    from vlm.eval.towers.benchmark import chosen
    from vlm.eval.towers.job import Options as Job
    from vlm.eval.towers.run import evaluate_towers
    from vlm.siglip.embedder import opened

    items, towers = options.items, options.towers.chosen()
    how = Job(
        **towers,
        batch_size=32 if options.batch == "auto" else options.batch,
        image_root=items.image_root,
        limit=items.limit,
        shuffle_images=items.shuffle_images,
        seed=items.seed,
    )
    assert items.tasks is not None
    kinds = {one.task.kind for one in chosen(items.tasks)}
    embedder = opened(
        options.model,
        pictures_only=kinds <= {"knn", "linear"},
        device=chosen_device(options.place.device),
        dtype=options.place.dtype,
        max_num_patches=options.reading.max_num_patches,
    )
    return evaluate_towers(embedder, items.tasks, items.data, options.out, options=how)


def _given(options: Options) -> dict[str, Any]:
    """The settings of decoding that were asked for."""
    return {name: value for name, value in asdict(options.decoding).items() if value is not None}


def _refuse_unread(given: dict[str, Any]) -> None:
    """Raise ConfigError for settings that the chosen way of answering would not read."""
    by = given.get("by")
    unread = {"likelihood": ("max_new_tokens", "num_beams", "beam_search"), "generate": ("normalization",)}
    names = [f"--{name.replace('_', '-')}" for name in unread.get(by or "", ()) if name in given]
    if names:
        raise ConfigError(f"--by {by} does not read {', '.join(names)}; leave one of the two out")


COMMAND = Command(
    name="eval",
    help="score a model on annotated images",
    details=(
        "Either --data FILE.jsonl with --metrics, or --data FOLDER with --tasks (--list-tasks). A model of two towers"
        " (SigLIP) has tasks of its own: zeroshot, retrieval, knn, linear on your data, imagenet and others. Run again"
        " with the same options, it goes on where it stopped. `vlm eval diff A B` compares two results. Several"
        " processes share the work: torchrun --nproc_per_node 2 -m vlm eval ..."
    ),
    options=Options,
    run=run,
    group="judge",
)
