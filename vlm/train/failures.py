"""What goes wrong while training: undecodable images are listed and counted, a machine's failures are explained."""

import json
import os
from pathlib import Path

from vlm.errors import DataError, TrainingError
from vlm.train.config import StageConfig
from vlm.train.data import LONGEST_WAIT_S, Failure, MicroBatch

MIN_FAILURES = 10
"""The share is not looked at before this many images failed: one of the first fifty is no sign yet."""


class Failures:
    """Appends each image that does not decode to `failures.jsonl` (rank r > 0: `failures-rank<r>.jsonl`), once.

    Args:
        out: the run directory.
        max_share: of the images read; more end the run.
    """

    def __init__(self, out: Path, max_share: float) -> None:
        rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
        self.path = out / (f"failures-rank{rank}.jsonl" if rank else "failures.jsonl")
        self.max_share = max_share
        self._listed = {(r["path"], r["line"]) for r in read_failures(self.path)}
        self._read = self._failed = 0

    def add(self, item: MicroBatch) -> DataError | None:
        """Record the failures of a micro-batch; the error that ends the run when there are too many, else None."""
        self._read += item.images_read
        self._failed += len(item.failures)
        for failure in item.failures:
            self._append(failure)
        if self._failed < MIN_FAILURES or self._failed <= self.max_share * self._read:
            return None
        return DataError(
            f"{self._failed} of {self._read} images read could not be decoded, more than {self.max_share:.1%}; "
            f"{self.path} lists them: repair them, then run again with --resume"
        )

    def _append(self, failure: Failure) -> None:
        example = failure.example
        key = (str(failure.image), example.line)
        if key in self._listed:
            return
        self._listed.add(key)
        record = {
            "id": example.id,
            "line": example.line,
            "path": key[0],
            "code": failure.code,
            "message": failure.message,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**record, "message": failure.message}) + "\n")


def read_failures(path: Path) -> list[dict]:
    """The records of a failures file; a last line torn by a kill is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def explain(error: RuntimeError, stage: StageConfig) -> TrainingError | None:
    """A failure of the machine as a sentence that says what to change, or None when it is something else."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "out of memory" in text or "can't allocate memory" in text:
        advice = f"raise `accumulate` (now {stage.accumulate})"
        if stage.batch_tokens is not None:
            advice = f"lower batch_tokens (now {stage.batch_tokens})"
        return TrainingError(
            f"stage {stage.name}: out of memory ({text}); {advice}, which leaves the result as it is, or lower "
            f"batch_size (now {stage.batch_size}) or the image size"
        )
    if "DataLoader timed out" in text:
        return TrainingError(
            f"stage {stage.name}: loading a micro-batch took longer than {LONGEST_WAIT_S} s; look for a hanging file "
            f"system or a huge image"
        )
    if "DataLoader worker" in text:
        return TrainingError(
            f"stage {stage.name}: a data loading process died ({text}); when it ran out of memory, lower workers or "
            f"cache_images_mb"
        )
    return None
