"""What is measured of a trained run: quality, costs, the tower by itself before and after, and what was held fixed.

In this order, because the memory of a process only grows: inference first.
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlm.build.towers import sized
from vlm.checkpoints import digests, identity
from vlm.checkpoints.directory import load
from vlm.compare import fixed
from vlm.compare.config import ProbeConfig, TaskConfig
from vlm.compare.runs import MEASUREMENTS, Spec
from vlm.data.content import of_items
from vlm.data.examples import Example, Labelled
from vlm.data.reading import read
from vlm.errors import CheckpointError, DataError, ImageError
from vlm.eval import results
from vlm.files import write_json
from vlm.images.load import image_size, load_image
from vlm.measure.cost import count_parameters, flops_per_image, image_tokens, inference_speed
from vlm.measure.probes import ProbeResult, probe, read_labelled, why_no_zero_shot, zero_shot
from vlm.model.forward import VLM
from vlm.model.processor import Processor
from vlm.train import failures, step_log
from vlm.train.config import RunConfig, load_config
from vlm.train.quiet import quiet_transformers
from vlm.train.sources import data_digest, read_sources

Evaluate = Callable[..., dict[str, Any]]
"""`vlm.eval.evaluate`: its arguments -> the results."""
TOKEN_IMAGES = 500
"""Images whose tokens are counted."""
SPEED_REPEATS = 3


def measure(spec: Spec, evaluate: Evaluate) -> None:
    """Measure a finished training run and write `measurements.json`. Raises `VLMError`.

    Args:
        evaluate: `vlm.eval.evaluate`.
    """
    run = spec.run
    device = "cuda" if run.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    tasks = {name: read_task(task) for name, task in spec.tasks.items()}
    with quiet_transformers():
        model, processor = load(run.out / "model", device=device)
        facts = {
            "arm": spec.arm,
            "encoder": spec.encoder,
            "projector": spec.projector,
            "seed": spec.seed,
            "images": processor.image_transform.describe(),
            "encoder_kind": model.config.encoder,
            **costs(model, processor, spec, tasks),
            "training": training_facts(run),
            "tasks": {name: score(model, processor, spec, name, evaluate) for name in tasks},
            "probes": None if spec.probes is None else probes(model, processor, spec, spec.probes, device),
            "fixed": fixed_facts(spec),
            "conditions": conditions(device),
        }
    write_json(spec.folder / MEASUREMENTS, facts)
    if not spec.keep_checkpoints:
        for stage in run.stages:
            shutil.rmtree(run.out / stage.name / "checkpoints", ignore_errors=True)


# --- costs ------------------------------------------------------------------------------------------------------------


def read_task(task: TaskConfig) -> list[Example]:
    """The items of a task. Raises `DataError`."""
    return read(task.data, image_root=task.image_root, require=())[0][: task.limit]


def costs(model: VLM, processor: Processor, spec: Spec, tasks: dict[str, list[Example]]) -> dict[str, Any]:
    """Speed and memory of inference, image tokens, parameters and floating-point operations.

    Speed is measured on the first images of the first task, in batches of its size, with as many new tokens as it
    allows, so that towers do the same work whatever they say.
    """
    task = next(iter(spec.tasks.values()))
    shown = decodable(next(iter(tasks.values())), spec.speed_images)
    prompts = [example.prefix for example in shown]
    speed = inference_speed(
        model,
        processor,
        [example.images[0] for example in shown],
        prompts,
        batch_size=min(task.batch_size, len(shown)),
        max_new_tokens=task.max_new_tokens,
        repeats=SPEED_REPEATS,
    )
    every = {str(image): image for examples in tasks.values() for example in examples for image in example.images}
    trained = sorted({part for stage in spec.run.stages for part in stage.train})
    return {
        "inference": {**speed, "batch_size": min(task.batch_size, len(shown)), "new_tokens": task.max_new_tokens},
        "image_tokens": image_tokens(
            processor, list(islice((image for image in every.values() if _opens(image)), TOKEN_IMAGES))
        ),
        "parameters": {**count_parameters(model, trained), "trained_parts": trained},
        "flops": flops_per_image(model, processor, shown[0].images[0], prompts[0]),
    }


def decodable(examples: Sequence[Example], most: int) -> list[Example]:
    """The first items with different images that can be decoded; the others count in the scores, not in the costs.

    Raises:
        DataError: there is none.
    """
    found: dict[str, Example] = {}
    for example in examples:
        if len(found) == most:
            break
        with suppress(ImageError):
            for image in example.images:
                load_image(image)
            if example.images:
                found.setdefault(str(example.images), example)
    if not found:
        raise DataError(f"{examples[0].file}: none of the images can be decoded")
    return list(found.values())


def _opens(image: Path | Image.Image) -> bool:
    """Whether the size of an image can be read."""
    try:
        image_size(image)
    except ImageError:
        return False
    return True


def training_facts(run: RunConfig) -> dict[str, Any]:
    """Speed and memory of training, from what the run recorded.

    Images per second of a stage: the median over its steps, without the first tenth, of the rate over the last ten
    seconds; of the run: all images by all seconds at these rates. Peak memory: the largest of the stages.
    """
    rows = step_log.read(run.out / "metrics.csv")
    stages = []
    for stage in run.stages:
        own = [row for row in rows if row["stage"] == stage.name]
        rates = [float(row["examples_per_s"]) for row in own[len(own) // 10 :]]
        manifest = json.loads((run.out / stage.name / "manifest.json").read_text(encoding="utf-8"))
        stages.append(
            {
                "name": stage.name,
                "steps": len(own),
                "images": len(own) * stage.batch_size,
                "images_per_second": statistics.median(rates),
                "peak_memory_bytes": manifest.get("peak_memory_bytes"),
                "final_loss": statistics.fmean(float(row["loss"]) for row in own[-max(1, len(own) // 20) :]),
            }
        )
    images = sum(stage["images"] for stage in stages)
    seconds = sum(stage["images"] / stage["images_per_second"] for stage in stages)
    peaks = [stage["peak_memory_bytes"] for stage in stages if stage["peak_memory_bytes"] is not None]
    return {
        "images": images,
        "seconds": seconds,
        "images_per_second": images / seconds,
        "peak_memory_bytes": max(peaks) if peaks else None,
        "failed_images": sum(failures.count(run.out).values()),
        "stages": stages,
    }


# --- quality ----------------------------------------------------------------------------------------------------------


def score(model: VLM, processor: Processor, spec: Spec, name: str, evaluate: Evaluate) -> dict[str, Any]:
    """One task, evaluated as `vlm eval` does; goes on where it stopped."""
    task = spec.tasks[name]
    outcome = evaluate(
        (model, processor),
        task.data,
        task.metrics,
        spec.folder / "eval" / name,
        batch_size=task.batch_size,
        decoding=task.decoding,
        limit=task.limit,
        image_root=task.image_root,
        report=False,
        progress=False,
    )
    return {
        "metrics": outcome["metrics"],
        "num_items": outcome["num_items"],
        "skipped": outcome["skipped"],
        "data_sha256": outcome["data"]["sha256"],
    }


def probes(model: VLM, processor: Processor, spec: Spec, config: ProbeConfig, device: str) -> dict[str, Any]:
    """The tower alone, as the run began and as it ended."""
    train = read_labelled(config.train, config.image_root)
    test = read_labelled(config.test, config.image_root)
    data = labelled_digest([*train, *test])
    after, reason = _probed(model, processor, spec, config, (train, test), device)
    start, start_processor = load(spec.run.out / "start", device=device)
    tower = identity.of_parts(start, start_processor.image_transform)["encoder"]
    key = digests.of_values([tower, asdict(config), data, _text_tower(spec)])
    # The same tower begins the runs of all seeds and projectors.
    kept = spec.folder.parents[2] / "probes" / f"{key[:32]}.json"
    if kept.is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))
    else:
        before, _ = _probed(start, start_processor, spec, config, (train, test), device)
        kept.parent.mkdir(exist_ok=True)
        write_json(kept, before, several=True)  # runs of other seeds may write it in the same moment
    return {"data_sha256": data, "before": before, "after": after, "no_zero_shot": reason}


def _probed(
    model: VLM,
    processor: Processor,
    spec: Spec,
    config: ProbeConfig,
    data: tuple[Sequence[Labelled], Sequence[Labelled]],
    device: str,
) -> tuple[dict[str, Any], str | None]:
    """Name of the probe -> accuracy and what it rests on; and why there is no zero-shot accuracy."""
    tower, transform = model.model.vision_tower, processor.image_transform
    train, test = data
    found = probe(tower, transform, train, test, batch_size=config.batch_size, k=config.k, device=device)
    told = {name: _told(result) for name, result in found.items()}
    source = _text_tower(spec)
    if source is None:
        return told, "the tower comes from no checkpoint"
    classes = sorted({item.label for item in train})
    try:
        reason = why_no_zero_shot(source, tower)
        if reason is not None:
            return told, reason
        result = zero_shot(
            source, tower, transform, test, classes, config.templates, batch_size=config.batch_size, device=device
        )
    except CheckpointError as error:
        # The texts are an extra: a tower without its tokenizer can be compared all the same.
        return told, str(error)
    return (told if result is None else {**told, "zero_shot": _told(result)}), None


def _text_tower(spec: Spec) -> str | None:
    """Where the tower came from, if that may hold a text tower too."""
    encoder = spec.run.model.encoder
    return str(sized(encoder)[0]) if isinstance(encoder, str) else None


def _told(result: ProbeResult) -> dict[str, Any]:
    return {
        "accuracy": result.accuracy,
        "num_train": result.num_train,
        "num_test": result.num_test,
        "num_classes": result.num_classes,
        "settings": result.settings,
    }


def labelled_digest(items: Sequence[Labelled]) -> str:
    """sha256 over ids, labels and the content of the images."""
    return of_items(items, ("id", "label"))


# --- what was held fixed ----------------------------------------------------------------------------------------------


def fixed_facts(spec: Spec) -> dict[str, Any]:
    """Digests of what this run really used; see `vlm.compare.fixed`.

    Raises `DataError`: the training data is not what the run was trained on any more.
    """
    run = load_config(spec.run.out / "config.yaml")  # as the training run itself recorded it
    recorded = json.loads((run.out / "model" / "training.json").read_text(encoding="utf-8"))["data_sha256"]
    examples, counts, _ = read_sources(run, skip_bad=False)
    if data_digest(examples) != recorded:
        raise DataError(
            f"the training data changed after {spec.name} was trained; delete {spec.folder} to run it again"
        )
    start, processor = load(run.out / "start")
    shapes = [[name, list(tensor.shape)] for name, tensor in start.parts()["projector"].named_parameters()]
    return {
        "data": recorded,
        "order": fixed.order_digest(run, counts),
        "seen": fixed.seen_digest(run.out),
        "settings": fixed.shared_settings(run.out),
        "tokenizer": digests.of_tokenizer(processor.tokenizer),
        "projector_shapes": digests.of_values(shapes),
        **identity.of_parts(start, processor.image_transform),
    }


def conditions(device: str) -> dict[str, Any]:
    """Machine and libraries: what speeds and memory depend on."""
    return {
        "host": platform.node(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "libraries": results.versions(),
    }
