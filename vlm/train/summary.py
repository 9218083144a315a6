"""The end of a run: where its models came from, its final model, and its summary."""

import logging
import shutil
from pathlib import Path
from typing import Any

from vlm import files, settings
from vlm.train import checkpoint, failures, step_log
from vlm.train.config import RunConfig
from vlm.train.history import accepted, read_record
from vlm.train.plan import Stage

log = logging.getLogger(__name__)


def provenance(stage: Stage) -> dict[str, Any]:
    """What `training.json` beside a stage's model holds."""
    record = read_record(stage.run.out)
    changed = accepted(stage.run.out)
    return {
        "stage": stage.config.name,
        "steps": stage.steps,
        "config": settings.to_dict(stage.run),
        "data_sha256": stage.sources.digest,
        "examples": len(stage.examples),
        "libraries": record[-1]["libraries"] if record else {},
        **({"changes": changed} if changed else {}),
    }


def finish(config: RunConfig, last: Path, final: Path, skipped: int, seconds: float) -> None:
    """`model/` (hard links to the last stage's files where the disk can), the loss curve and a summary."""
    with checkpoint.clean_failure(final), files.publishing(final) as folder:
        shutil.copytree(last, folder, copy_function=files.link_or_copy, dirs_exist_ok=True)
    step_log.plot(config.out / "metrics.csv", config.out / "loss.html")
    failed = failures.count(config.out)
    rows = step_log.read(config.out / "metrics.csv")
    stages = step_log.summary(rows)
    summary = {
        "model": str(final),
        "seconds": round(seconds, 1),
        "steps": len(rows),
        "stages": stages,
        "skipped_annotations": skipped,
        "failed_images": sum(failed.values()),
        "failed_images_in": failed,
    }
    files.write_json(config.out / "summary.json", summary)
    for name, found in stages.items():
        losses = ", ".join(f"{what.replace('_', '-')} {found[what]:.4f}" for what in found if what != "steps")
        log.info("stage %s: %d steps, %s", name, found["steps"], losses.replace("-loss", " loss"))
    log.info("trained model: %s (%.0f s)", final, seconds)
