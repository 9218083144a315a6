"""What goes wrong while training: undecodable images are listed and counted, a machine's failures are explained."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlm import ranks
from vlm.errors import DataError, TrainingError
from vlm.files import Journal, read_lines
from vlm.train.items import Failure
from vlm.train.loader import LONGEST_WAIT_S
from vlm.train.stage_config import StageConfig

NAME = "failures.jsonl"
TRAINING, VALIDATION, EVALUATION = "training", "validation", "evaluation"
"""What an image was read for. In training another takes its place; in validation the loss is over the others; in an
evaluation its answer counts as wrong."""
MIN_FAILURES = 10
"""The share is not looked at before this many images failed: one of the first fifty is no sign yet."""


class Failures:
    """Lists each image that does not decode once: in `failures.jsonl`, rank r > 0 in `failures-rank<r>.jsonl` until
    `collect` brings all of them together.

    Args:
        out: the run directory.
        max_share: of the images read by all ranks for training; more end the run.
    """

    def __init__(self, out: Path, max_share: float) -> None:
        rank = ranks.rank()
        self.path = out / (f"failures-rank{rank}.jsonl" if rank else NAME)
        self.max_share = max_share
        self._journal: Journal | None = None
        self._listed: set[tuple[Any, ...]] = set()
        if self.path.exists():
            self._open()
        self._read = self._failed = 0

    def add(self, failures: Sequence[Failure], during: str = TRAINING) -> None:
        """List failures that are not listed yet. Raises `DiskError`."""
        self._append(
            {
                "id": failure.example.id,
                "file": None if failure.example.file is None else str(failure.example.file),
                "line": failure.example.line,
                "path": str(failure.image),
                "code": failure.code,
                "message": failure.message,
                "during": during,
            }
            for failure in failures
        )

    def judge(self, read: int, failed: int) -> DataError | None:
        """Count images that all ranks have read for training, and of these the failed ones; the error that ends the run
        when there are too many, else None."""
        self._read += read
        self._failed += failed
        if self._failed < MIN_FAILURES or self._failed <= self.max_share * self._read:
            return None
        return DataError(
            f"{self._failed} of {self._read} images read could not be decoded, more than {self.max_share:.1%}; "
            f"{self.path} lists {'those of this process' if ranks.launched() else 'them'}: repair them, then go on with"
            " --resume --accept-changes (the data are others then)"
        )

    def collect(self) -> None:
        """Called on every rank: rank 0's list takes in those of the others, and those that killed ranks have left."""
        shares = ranks.current().gather(read_lines(self.path) if ranks.rank() else [])
        left = sorted(self.path.parent.glob("failures-rank*.jsonl")) if ranks.rank() == 0 else []
        self._append(record for share in [*shares, *map(read_lines, left)] for record in share)
        ranks.current().barrier()
        self.close()
        for path in [*left, *([self.path] if ranks.rank() else [])]:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _append(self, records: Iterable[dict[str, Any]]) -> None:
        new = []
        for record in records:
            if _key(record) not in self._listed:
                self._listed.add(_key(record))
                new.append(record)
        if new:
            journal = self._journal or self._open()
            journal.append(new)

    def _open(self) -> Journal:
        self._journal = Journal(self.path)
        self._listed |= {_key(record) for record in self._journal.records}
        return self._journal


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in ("file", "line", "path"))


def count(out: Path) -> dict[str, int]:
    """Listed images of a run, by what they were read for: training, validation, evaluation."""
    listed = [record.get("during", TRAINING) for record in read_lines(out / NAME)]
    return {during: listed.count(during) for during in (TRAINING, VALIDATION, EVALUATION)}


def _smaller(stage: StageConfig) -> str:
    """What makes micro-batches smaller and leaves the result as it is, if anything does."""
    same = "which leaves the result as it is, and go on with --resume; or "
    if stage.batch_tokens is not None:
        return f"lower batch_tokens (now {stage.batch_tokens}), {same}"
    world = ranks.current().world
    cuts = [n for n in range(stage.accumulate + 1, stage.batch_size + 1) if stage.batch_size % (n * world) == 0]
    return f"raise `accumulate` (now {stage.accumulate}) to {cuts[0]}, {same}" if cuts else ""


def explain(error: RuntimeError, stage: StageConfig) -> TrainingError | None:
    """A failure of the machine as a sentence that says what to change, or None when it is something else."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "out of memory" in text or "can't allocate memory" in text:
        return TrainingError(
            f"stage {stage.name}: out of memory ({text}); {_smaller(stage)}lower batch_size (now {stage.batch_size})"
            f" and go on with --resume --accept-changes, or start a run with smaller images"
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
