"""Evaluation: metrics that stand alone, tasks, the harness that answers and scores.

Names resolve lazily: `vlm.eval.metrics` is usable without torch, and nothing here imports the training code.
"""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "evaluate": "harness",
    "evaluate_tasks": "suite",
    "Options": "job",
    "score_files": "scoring",
    "diff": "",
    "metrics": "",
    "tasks": "",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.eval import diff as diff
    from vlm.eval import metrics as metrics
    from vlm.eval import tasks as tasks
    from vlm.eval.harness import evaluate as evaluate
    from vlm.eval.job import Options as Options
    from vlm.eval.scoring import score_files as score_files
    from vlm.eval.suite import evaluate_tasks as evaluate_tasks

__getattr__, __dir__ = door(__name__, _HOMES)
