"""Evaluate a model: predict every item, score, write results and a page.

    outcome = evaluate("runs/x/model", "test.jsonl", "exact_match,cider", "runs/x/eval")
    print(table(outcome))

Into OUT go `predictions.jsonl` (as they are made; a killed run goes on where it stopped), `items.jsonl` (every item
with prediction, gold texts and scores), `results.json` and `report.html`.

Started by torchrun or `accelerate launch`, all processes share the work, and each returns the results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm.data.control import without_control
from vlm.data.examples import Example
from vlm.data.problems import Problem
from vlm.data.reading import read
from vlm.errors import ConfigError
from vlm.eval import items, results
from vlm.eval.job import Job, Options, fitting, room_of, run
from vlm.eval.metrics import registry
from vlm.generation.batch_size import BatchSize
from vlm.generation.predictor import Decoding, Predictor, as_predictor
from vlm.text import control

if TYPE_CHECKING:
    from vlm.model.forward import VLM
    from vlm.model.processor import Processor


def evaluate(
    model: str | Path | tuple[VLM, Processor] | Predictor,
    data: str | Path | Sequence[Example],
    metrics: str | Sequence[str],
    out: str | Path,
    *,
    batch_size: BatchSize = 16,
    batch_tokens: int | None = None,
    max_new_tokens: int = 64,
    num_beams: int = 1,
    beam_search: str = "transformers",
    by: Literal["generate", "likelihood"] = "generate",
    normalization: Literal["none", "token", "byte"] = "none",
    limit: int | None = None,
    skip_bad: bool = False,
    strip_control: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    geometry: Mapping[str, Any] | None = None,
    shuffle_images: bool = False,
    seed: int = 0,
    image_root: str | Path | None = None,
    kind_of: Callable[[Example], str] | None = None,
    report: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Predict, score and report. Started again with the same settings it goes on where it stopped.

    An image that cannot be decoded counts as answered with the empty text; it is listed in the results and never
    leaves the denominator. The command line exits with 3 when `skipped` in the results is above 0.

    Args:
        model: a directory or hub id, a (model, processor) pair, or any `Predictor`.
        data: a JSONL file, or examples.
        metrics: names, as a list or comma-separated.
        out: the folder for everything that is written.
        batch_size: items predicted at a time, or `auto`, the largest power of two that fits into the memory; results do
            not depend on it beyond floating-point rounding. batch_tokens: instead, as many items at a time as have at
            most so many image and prompt tokens, padding included.
        max_new_tokens, num_beams, beam_search: of `vlm.generate`.
        by: `likelihood` chooses the likeliest of an item's candidates (`Example.info["choices"]`) instead of writing
            text; `normalization` is its rule, see `vlm.generation.likelihood`.
        limit: only the first so many items.
        skip_bad: leave out annotations that are broken or too long for the model, list and count them, instead of
            refusing the file.
        strip_control: remove control spellings such as `<image>` from the prompts (`vlm.text.control`).
        device, dtype: where and as what a model directory is opened; see `as_predictor`.
        geometry: how the model reads its images, if not as it is: `{"image_size": 448}`, or what else
            `vlm.checkpoints.geometry.with_geometry` takes.
        shuffle_images: the control that shows whether the model looks: each item gets another item's image (`seed`).
        image_root: folder of the images; the data file's own by default.
        kind_of: example -> kind for the breakdown; taken from the prompt by default.
        report: write `report.html` too.
        progress: show progress on stderr.

    Returns:
        What `results.json` holds: `metrics` (name -> value, interval_95, num_items, rule, version), `num_items`,
        `skipped`, `failures`, `by_kind`, and what is needed to repeat it (model, data, prompts, decoding, versions).

    Raises:
        ConfigError: unknown metric, a number out of range, or OUT holds predictions of other settings.
        DataError: broken annotations (without `skip_bad`), items without gold text, no image could be decoded.
    """
    options = Options(
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        shuffle_images=shuffle_images,
        seed=seed,
        report=report,
        progress=progress,
    )
    decoding = Decoding(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        beam_search=beam_search,
        by=by,
        normalization=normalization,
    )
    job = file_job(
        *(data, metrics, decoding),
        limit=limit,
        skip_bad=skip_bad,
        strip_control=strip_control,
        image_root=image_root,
        kind_of=kind_of,
    )
    predictor, name = as_predictor(model, device=device, dtype=dtype, geometry=geometry)
    return run(fitting(job, room_of(predictor)), predictor, name, out, options)


def file_job(
    data: str | Path | Sequence[Example],
    metrics: str | Sequence[str],
    decoding: Decoding,
    *,
    limit: int | None = None,
    skip_bad: bool = False,
    strip_control: bool = False,
    image_root: str | Path | None = None,
    kind_of: Callable[[Example], str] | None = None,
) -> Job:
    """The job that a JSONL file (or examples) and names of metrics describe; see `evaluate`."""
    check_limit(limit)
    chosen = registry.expand(metrics)
    examples, problems = _examples(data, limit, skip_bad, image_root)
    examples = without_control(examples, control.SETTING, strip=strip_control)
    results.check(chosen, examples)
    kind = kind_of or (lambda example: items.prompt_kind(example.prefix))
    return Job(
        examples=examples,
        problems=problems,
        skip_bad=skip_bad,
        source=str(data) if isinstance(data, str | Path) else f"{len(data)} examples in memory",
        metrics=chosen,
        decoding=decoding,
        candidates=items.choices_of if decoding.by == "likelihood" else None,
        kinds={example.id: kind(example) for example in examples},
        limit=limit,
    )


def check_limit(limit: int | None) -> None:
    """Raise ConfigError unless there is no limit, or one of at least 1."""
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}, expected at least 1")


def _examples(
    data: str | Path | Sequence[Example], limit: int | None, skip_bad: bool, image_root: str | Path | None
) -> tuple[list[Example], list[Problem]]:
    if isinstance(data, str | Path):
        root = None if image_root is None else Path(image_root)
        examples, problems = read(data, image_root=root, require=(), skip_bad=skip_bad)
    else:
        examples, problems = list(data), []
    examples = examples[:limit]
    items.check(examples)
    return examples, problems
