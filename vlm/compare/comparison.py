"""A comparison from start to end: plan, run what is not there yet, summarise, report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.compare import match, page, table
from vlm.compare.config import CompareConfig, ProbeConfig, make_arms, run_config
from vlm.compare.match import How
from vlm.compare.matched import Matched
from vlm.compare.processes import Server, run_all, slots, visible_gpus
from vlm.compare.runs import Spec, claim, make_specs
from vlm.compare.sources import check_sources, sources
from vlm.compare.summary import summarise
from vlm.data.examples import Example
from vlm.data.reading import read, read_labelled
from vlm.errors import ConfigError, DataError, TrainingError
from vlm.eval import items
from vlm.eval.metrics import registry
from vlm.files import Lock, disk_errors, locked, write_json, write_text
from vlm.registry import use
from vlm.siglip.sets import check_sets, check_templates, images_in_both
from vlm.train.sources import data_digest, read_sources

log = logging.getLogger(__name__)

RESULT, CSV, REPORT = "comparison.json", "comparison.csv", "report.html"


@dataclass(frozen=True)
class Plan:
    """What will be run."""

    arms: list[Matched]
    seeds: list[int]
    how: How
    tasks: dict[str, list[Example]]
    data: str
    """Digest of the training data."""


def plan(
    config: CompareConfig,
    *,
    encoders: Sequence[str] = (),
    projectors: Sequence[str] = (),
    seeds: Sequence[int] = (),
    how: How = "tokens",
) -> Plan:
    """Choose and match the arms, and read all data once, so that what must be refused is refused before the first run.

    Raises `VLMError`.
    """
    arms = make_arms(config, encoders, projectors)
    chosen = list(dict.fromkeys(seeds or config.seeds))
    for arm in arms:
        run_config(config, arm, chosen[0], Path("out"))
    for name, task in config.tasks.items():
        try:
            registry.expand(task.metrics)
        except ConfigError as error:
            raise ConfigError(f"tasks.{name}: {error}") from error
    examples, _, _ = read_sources(run_config(config, arms[0], chosen[0], Path("out")), skip_bad=False)
    tasks = {name: _read_task(config, name) for name in config.tasks}
    if config.probes is not None:
        _check_probes(config.probes)
    sizes = match.sizes_of([image for example in next(iter(tasks.values())) for image in example.images])
    if not sizes:
        raise DataError(f"{next(iter(config.tasks.values())).data}: none of the images can be opened")
    made = match.match(arms, how, sizes, config.tokens)
    _check_budgets(config, made, how)
    return Plan(made, chosen, how, tasks, data_digest(examples))


def compare(
    config: CompareConfig,
    out: str | Path,
    *,
    encoders: Sequence[str] = (),
    projectors: Sequence[str] = (),
    seeds: Sequence[int] = (),
    how: How = "tokens",
    jobs: int | None = None,
    encoder_class: str | None = None,
    server: Server | None = None,
) -> dict[str, Any]:
    """Run the comparison in `out`, or go on with it, and return what `comparison.json` holds.

    Finished runs are never run again; a run that was interrupted goes on after its newest checkpoint; one that failed
    is tried again. A run that fails takes no other with it: it is listed under `failed`.

    Args:
        encoders, projectors: names of the configuration, or checkpoints and projector kinds; none: all that it has.
        seeds: of data order and new weights; none: those of the configuration.
        how: what is made equal between towers, as far as possible: `tokens`, `resolution` or `none`.
        jobs: runs at once; None: one per GPU, or one.
        encoder_class: an encoder of the user's own, made known in every process.
        server: one that starts the runs' processes, for several comparisons in one program; None starts one.

    Raises:
        VLMError: what a person can mend; nothing was run then, or no run came to its end.
        Stopped: (a SystemExit) a signal came; the runs saved and left.
    """
    folder = Path(out)
    if encoder_class is not None:
        use("vlm.encoders", encoder_class)
    made = plan(config, encoders=encoders, projectors=projectors, seeds=seeds, how=how)
    log.info("%s", match.table(made.arms, how))
    with _locked(folder):
        specs = make_specs(config, [item.arm for item in made.arms], made.seeds, folder, encoder_class)
        for spec in specs:
            claim(spec)
            check_sources(spec, sources(spec.run.model, made.data))
        _check_items(specs, made.tasks)
        accelerator = specs[0].run.accelerator
        failed = run_all(specs, slots(jobs, visible_gpus(accelerator)), _tell, server)
        if not any(spec.finished for spec in specs):
            raise TrainingError(
                "no run came to its end: " + "; ".join(f"{name}: {why}" for name, why in failed.items())
            )
        return _write(folder, config, made, specs, failed)


def _tell(spec: Spec) -> None:
    """The figures of a run that has just ended, in a line."""
    told = [
        f"{task} {metric} {found['value']:.4f}"
        for task, facts in spec.measurements()["tasks"].items()
        for metric, found in facts["metrics"].items()
    ]
    log.info("  %s", ", ".join(told))


def _write(
    folder: Path, config: CompareConfig, made: Plan, specs: Sequence[Spec], failed: dict[str, str]
) -> dict[str, Any]:
    groups = {
        task: {example.id: items.image_name(example) for example in examples} for task, examples in made.tasks.items()
    }
    asked = {
        "match": made.how,
        "seeds": made.seeds,
        "arms": [item.arm.name for item in made.arms],
        "tokens": config.tokens,
        "tasks": {name: str(task.data) for name, task in config.tasks.items()},
    }
    result = summarise(specs, made.arms, groups, failed, asked)
    write_json(folder / RESULT, result)
    finished = [spec for spec in specs if spec.finished]
    write_text(folder / CSV, table.as_csv([spec.measurements() for spec in finished]))
    page.write(folder / REPORT, result, finished, made.tasks)
    return result


def _read_task(config: CompareConfig, name: str) -> list[Example]:
    task = config.tasks[name]
    examples = read(task.data, image_root=task.image_root, require=())[0][: task.limit]
    items.check(examples)
    return examples


def _check_items(specs: Sequence[Spec], tasks: dict[str, list[Example]]) -> None:
    """Refuse finished runs that were asked other items than the files hold now."""
    now = {name: items.digest(examples) for name, examples in tasks.items()}
    for spec in specs:
        for name, facts in spec.measurements()["tasks"].items() if spec.finished else ():
            if facts["data_sha256"] != now[name]:
                raise DataError(
                    f"tasks.{name}: the items changed after {spec.name} was measured; put them back, or delete"
                    f" {spec.folder / 'measurements.json'} and {spec.folder / 'eval' / name} to measure it again"
                )


def _check_budgets(config: CompareConfig, arms: Sequence[Matched], how: How) -> None:
    """Refuse budgets of training that would undo the match, or that a tower cannot have."""
    if config.run["data"].get("max_num_patches") is None:
        return
    if how != "none":
        raise ConfigError(
            f"run.data.max_num_patches would train towers on other numbers of patches than they are matched to ({how});"
            f" leave it out, or give --match none"
        )
    squares = [item.arm.name for item in arms if not item.transform.any_aspect]
    if squares:
        raise ConfigError(
            f"run.data.max_num_patches is a budget of NaFlex towers, and {', '.join(squares)} read squares; leave it"
            f" out"
        )


def _check_probes(probes: ProbeConfig) -> None:
    """Refuse now what would end every run after it was trained. Raises `VLMError`."""
    train, test = (read_labelled(path, probes.image_root) for path in (probes.train, probes.test))
    try:
        check_sets(train, test, probes.k)
        check_templates(probes.templates)
    except DataError as error:
        raise DataError(f"probes: {error}") from error
    both = images_in_both(train, test)
    if both:
        log.warning(
            "probes: %d images are in both %s and %s, and may be learnt by heart", both, probes.train, probes.test
        )


def _locked(folder: Path) -> Lock:
    """Keep a second comparison out of the same folder."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return locked(
        folder / ".lock",
        lambda owner: ConfigError(
            f"{folder}: another comparison is running in this folder (process {owner}); wait for it, or use another"
        ),
    )
