"""Evaluate a model: predict every item, score, write results and a page.

    outcome = evaluate("runs/x/model", "test.jsonl", "exact_match,cider", "runs/x/eval")
    print(table(outcome))

Into OUT go `predictions.jsonl` (as they are made; a killed run goes on where it stopped), `items.jsonl` (every item
with prediction, gold texts and scores), `results.json` and `report.html`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlm.data import Example, Problem, read_jsonl
from vlm.errors import ConfigError, DataError, ImageError
from vlm.images import load_image

from . import items, results, results_page
from .metrics import registry
from .predictor import Decoding, Predictor, as_predictor
from .progress import Progress
from .results import Record
from .store import PredictionStore, write_json, write_lines

if TYPE_CHECKING:
    from vlm.model import VLM
    from vlm.processor import Processor

RESULTS = "results.json"
ITEMS = "items.jsonl"
REPORT = "report.html"
MAX_BAD_IN_A_ROW = 100
"""So many undecodable images one after another mean a broken disk or a wrong folder, not bad luck: the run stops."""

_DECODERS = 2  # threads that decode images while the model works; Pillow releases the interpreter lock


def evaluate(
    model: str | Path | tuple[VLM, Processor] | Predictor,
    data: str | Path | Sequence[Example],
    metrics: str | Sequence[str],
    out: str | Path,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    num_beams: int = 1,
    beam_search: str = "transformers",
    limit: int | None = None,
    skip_bad: bool = False,
    device: str | None = None,
    dtype: str | None = None,
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
        batch_size: items predicted at a time; results do not depend on it beyond floating-point rounding.
        max_new_tokens, num_beams, beam_search: of `vlm.generate`.
        limit: only the first so many items.
        skip_bad: leave out annotations that are broken, list and count them, instead of refusing the file.
        device, dtype: where and as what a model directory is opened; see `as_predictor`.
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
    _check_numbers(batch_size, limit)
    chosen = registry.expand(metrics)
    examples, problems = _examples(data, limit, skip_bad, image_root)
    shown = items.shuffle_images(examples, seed) if shuffle_images else examples
    predictor, name = as_predictor(model, device=device, dtype=dtype)
    decoding = Decoding(max_new_tokens=max_new_tokens, num_beams=num_beams, beam_search=beam_search)
    settings: dict[str, Any] = {
        "model": predictor.identity(),
        "data_sha256": items.digest(examples),
        "decoding": decoding.to_dict(),
        "images_shuffled_with_seed": seed if shuffle_images else None,
    }
    started = time.monotonic()
    with PredictionStore(out, settings) as store:
        resumed = len(store.records)
        _predict(predictor, shown, store, batch_size, decoding, progress)
        records = [store.records[example.id] for example in examples]
    _refuse_if_all_bad(records)
    scored = results.score(chosen, examples, records)
    kind = kind_of or (lambda example: items.prompt_kind(example.prefix))
    kinds = {example.id: kind(example) for example in examples}
    outcome = {
        **results.figures(scored, kinds, records, problems),
        "model": {"name": name, **settings["model"]},
        "data": {"source": _source(data), "sha256": settings["data_sha256"], "limit": limit},
        "prompts": {"format": "[image tokens][BOS]prefix\\n", "examples": results.one_prompt_per_kind(examples, kinds)},
        "decoding": settings["decoding"],
        "images_shuffled_with_seed": settings["images_shuffled_with_seed"],
        "run": {"batch_size": batch_size, "resumed_items": resumed, "seconds": round(time.monotonic() - started, 2)},
        "versions": results.versions(),
    }
    folder = Path(out)
    write_lines(folder / ITEMS, results.item_lines(examples, records, scored, kinds))
    write_json(folder / RESULTS, outcome)
    if report:
        results_page.write(folder / REPORT, outcome, shown, records, scored, kinds)
    return outcome


# --- Data -------------------------------------------------------------------------------------------------------------


def _check_numbers(batch_size: int, limit: int | None) -> None:
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1")


def _examples(
    data: str | Path | Sequence[Example], limit: int | None, skip_bad: bool, image_root: str | Path | None
) -> tuple[list[Example], list[Problem]]:
    if isinstance(data, str | Path):
        root = None if image_root is None else Path(image_root)
        examples, problems = read_jsonl(data, image_root=root, require=(), skip_bad=skip_bad)
    else:
        examples, problems = list(data), []
    examples = examples[:limit]
    items.check(examples)
    return examples, problems


# --- Prediction -------------------------------------------------------------------------------------------------------


def _predict(
    predictor: Predictor,
    examples: Sequence[Example],
    store: PredictionStore,
    batch_size: int,
    decoding: Decoding,
    progress: bool,
) -> None:
    """Predict what the store does not hold yet.

    A batch of which a part is there already (the run was killed while it was written, or had another batch size) is
    predicted whole, so that its numbers do not depend on the interruption; only the missing items are added.
    """
    batches = items.plan(examples, batch_size)
    todo = [
        [examples[i] for i in batch] for batch in batches if any(examples[i].id not in store.records for i in batch)
    ]
    bad_in_a_row = 0
    with Progress(len(examples), done=len(store.records), label="predict", visible=progress) as bar:
        for batch, images in _decoded(todo, predictor.background):
            records = _predict_batch(predictor, batch, images, decoding)
            for record in records:
                bad_in_a_row = bad_in_a_row + 1 if "error" in record else 0
            new = [record for record in records if record["id"] not in store.records]
            store.append(new)
            bar.advance(len(new))
            if bad_in_a_row >= MAX_BAD_IN_A_ROW:
                error = records[-1]["error"]
                raise DataError(f"{bad_in_a_row} images in a row could not be decoded; the last: {error['message']}")


def _predict_batch(
    predictor: Predictor, batch: Sequence[Example], images: Sequence[Image.Image | ImageError], decoding: Decoding
) -> list[Record]:
    usable = [(ex, im) for ex, im in zip(batch, images, strict=True) if not isinstance(im, ImageError)]
    texts: list[str] = []
    if usable:
        texts = predictor.predict(
            [image for _, image in usable],
            [example.prefix for example, _ in usable],
            ids=[example.id for example, _ in usable],
            decoding=decoding,
        )
    said = dict(zip((example.id for example, _ in usable), texts, strict=True))
    records: list[Record] = []
    for example, image in zip(batch, images, strict=True):
        record: Record = {"id": example.id, "prefix": example.prefix, "prediction": said.get(example.id, "")}
        if isinstance(image, ImageError):
            record["error"] = {"code": image.code, "message": str(image)}
        records.append(record)
    return records


def _decoded(
    batches: Sequence[Sequence[Example]], background: tuple[int, int, int]
) -> Iterator[tuple[Sequence[Example], list[Image.Image | ImageError]]]:
    """Each batch with its decoded images, one batch ahead of the consumer."""

    def decode(example: Example) -> Image.Image | ImageError:
        try:
            return load_image(example.image, background=background)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(_DECODERS) as pool:
        waiting: list[list[Future[Image.Image | ImageError]]] = []
        for position, batch in enumerate(batches):
            for ahead in batches[position + len(waiting) : position + 2]:
                waiting.append([pool.submit(decode, example) for example in ahead])
            yield batch, [future.result() for future in waiting.pop(0)]


def _refuse_if_all_bad(records: Sequence[Record]) -> None:
    if all("error" in record for record in records):
        first = records[0]["error"]
        raise DataError(f"none of the {len(records)} images could be decoded; the first: {first['message']}")


def _source(data: str | Path | Sequence[Example]) -> str:
    return str(data) if isinstance(data, str | Path) else f"{len(data)} examples in memory"
