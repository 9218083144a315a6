"""`vlm eval`: score a model on a file or on tasks. `vlm eval diff`: compare two such results."""

import json
import sys
from argparse import Action, Namespace
from pathlib import Path
from typing import Any, Literal

from vlm import children
from vlm.cli import console
from vlm.cli.options import (
    add_generation,
    add_geometry,
    add_model,
    at_least,
    check_beams,
    check_device,
    command,
    geometry,
    unless_auto,
)

_DECODING = ("max_new_tokens", "num_beams", "beam_search", "by", "normalization")


def add(commands: Any) -> None:
    details = (
        "Either --data FILE.jsonl with --metrics, or --data FOLDER with --tasks (--list-tasks). Run again"
        " with the same options, it goes on where it stopped. `vlm eval diff A B` compares two results. Several"
        " processes share the work: torchrun --nproc_per_node 2 -m vlm eval ..."
    )
    parser = command(commands, run_eval, "eval", "score a model on annotated images", details)
    parser.add_argument("--list-tasks", action=_ListTasks, nargs=0, help="list the tasks and stop")
    add_model(parser)
    parser.add_argument(
        *("--data", "-d"),
        type=Path,
        required=True,
        metavar="PATH",
        help="annotations, as JSONL; or the folder of the tasks' files",
    )
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--metrics", metavar="A,B", help="for a JSONL file: names of metrics, such as exact_match,cider")
    form.add_argument("--tasks", metavar="A,B", help="names of tasks, such as vqav2,pope@adversarial, or a YAML file")
    parser.add_argument("--out", "-o", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--image-root", type=Path, metavar="DIR", help="folder of the images (that of the JSONL file)")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="only the first N items (of each task)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out and list broken annotations of a JSONL file")
    parser.add_argument("--shuffle-images", action="store_true", help="control: give each item another item's image")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of the shuffling (0)")
    add_geometry(parser)
    add_generation(parser, batch_size=None)
    parser.set_defaults(**dict.fromkeys(_DECODING))  # None: what the task says, or evaluate's own
    at_a_time = parser.add_mutually_exclusive_group()
    at_a_time.add_argument(
        *("--batch", "--batch-size"),
        dest="batch_size",
        type=_batch_size,
        default=16,
        metavar="N",
        help="items at a time (16), or auto: the largest power of two that fits into the memory",
    )
    at_a_time.add_argument(
        "--batch-tokens",
        type=at_least(1),
        metavar="N",
        help="instead of --batch: as many items at a time as have N image and prompt tokens (NaFlex towers)",
    )
    parser.add_argument(
        "--by",
        choices=("generate", "likelihood"),
        help="write answers, or choose the likeliest of the candidates (what the task says, else generate)",
    )
    parser.add_argument(
        "--normalization",
        choices=("none", "token", "byte"),
        help="of --by likelihood: the sum over a candidate's tokens, or divided by its tokens or bytes",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    _add_diff(commands)


class _ListTasks(Action):
    """Like --help: needs none of the options that are required otherwise."""

    def __call__(self, *_: Any) -> None:
        from vlm.eval.tasks.catalogue import table

        with children.endings():
            print(table())
        raise SystemExit(console.OK)


def _batch_size(text: str) -> int | Literal["auto"]:
    return "auto" if text == "auto" else at_least(1)(text)


def run_eval(options: Namespace) -> int:
    """`vlm eval`: the table of scores on stdout."""
    from vlm import ranks
    from vlm.errors import ConfigError
    from vlm.eval import tables

    if options.tasks is not None and (options.image_root or options.skip_bad):
        raise ConfigError("--image-root and --skip-bad are for a JSONL file; with --tasks the tasks name their files")
    _refuse_unread(_given(options))
    if options.tasks is None:  # a task may say how many beams it takes
        check_beams(options.num_beams, options.beam_search)
    check_device(options.device)
    console.quiet_transformers()
    with ranks.joined() as group:
        results = _on_file(options) if options.tasks is None else _on_tasks(options)
        if group.main:
            print(json.dumps(results, indent=1) if options.json else tables.table(results))
            print(f"written to {options.out}", file=sys.stderr)
        # One process tells it: a launcher takes the first code above 0 for a crash of the whole.
        return console.SKIPPED if results["skipped"] and group.main else console.OK


def _on_file(options: Namespace) -> dict[str, Any]:
    from vlm.eval.harness import evaluate

    return evaluate(
        options.model,
        options.data,
        options.metrics,
        options.out,
        **_given(options),
        image_root=options.image_root,
        strip_control=options.strip_control,
        batch_size=options.batch_size,
        batch_tokens=options.batch_tokens,
        limit=options.limit,
        skip_bad=options.skip_bad,
        shuffle_images=options.shuffle_images,
        seed=options.seed,
        device=unless_auto(options.device),
        dtype=unless_auto(options.dtype),
        geometry=geometry(options),
    )


def _on_tasks(options: Namespace) -> dict[str, Any]:
    from vlm.eval.harness import evaluate_tasks
    from vlm.eval.job import Options

    how = Options(
        batch_size=options.batch_size,
        batch_tokens=options.batch_tokens,
        shuffle_images=options.shuffle_images,
        seed=options.seed,
    )
    return evaluate_tasks(
        options.model,
        options.tasks,
        options.data,
        options.out,
        options=how,
        limit=options.limit,
        decoding=_given(options),
        strip_control=options.strip_control,
        device=unless_auto(options.device),
        dtype=unless_auto(options.dtype),
        geometry=geometry(options),
    )


def _given(options: Namespace) -> dict[str, Any]:
    """The settings of decoding that were asked for."""
    return {name: getattr(options, name) for name in _DECODING if getattr(options, name) is not None}


def _refuse_unread(given: dict[str, Any]) -> None:
    """Raise ConfigError for settings that the chosen way of answering would not read."""
    from vlm.errors import ConfigError

    by = given.get("by")
    unread = {"likelihood": ("max_new_tokens", "num_beams", "beam_search"), "generate": ("normalization",)}
    names = [f"--{name.replace('_', '-')}" for name in unread.get(by or "", ()) if name in given]
    if names:
        raise ConfigError(f"--by {by} does not read {', '.join(names)}; leave one of the two out")


# --- diff -------------------------------------------------------------------------------------------------------------


def _add_diff(commands: Any) -> None:
    details = (
        "A and B are folders that `vlm eval` has written about the same items, or about the same tasks; the difference"
        " is B minus A."
    )
    parser = command(commands, run_diff, "eval-diff", "compare two results item by item (`vlm eval diff A B`)", details)
    parser.prog = "vlm eval diff"
    parser.add_argument("a", type=Path, metavar="A", help="folder of results")
    parser.add_argument("b", type=Path, metavar="B", help="folder of results, of the same items")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the items that changed")
    parser.add_argument("--json", action="store_true", help="print JSON, with all items that changed")


def run_diff(options: Namespace) -> int:
    """`vlm eval diff`: a table of differences on stdout."""
    from vlm.eval import diff

    found = {label: diff.compare(*folders) for label, folders in diff.pairs(options.a, options.b).items()}
    if options.html:
        diff.write_page(options.html, found)
    if options.json:
        print(json.dumps(found if len(found) > 1 else next(iter(found.values())), indent=1))
    else:
        print("\n\n".join(diff.table(one) for one in found.values()))
    return console.OK
