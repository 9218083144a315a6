"""Evaluation: metrics that stand alone, tasks, the harness that answers and scores.

Names resolve lazily: `vlm.eval.metrics` is usable without torch, and nothing here imports the training code.
"""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "evaluate": "harness",
    "evaluate_tasks": "harness",
    "evaluate_towers": "towers.run",
    "Options": "job",
    "score_files": "scoring",
    "Predictor": "vlm.generation.predictor",
    "table": "tables",
    "Curve": "vlm.report.charts",
    "Dot": "vlm.report.charts",
    "Scatter": "vlm.report.charts",
    "Curves": "vlm.report.sections",
    "Figure": "vlm.report.sections",
    "Gallery": "vlm.report.sections",
    "GalleryItem": "vlm.report.sections",
    "Score": "vlm.report.scores",
    "Scores": "vlm.report.scores",
    "Stat": "vlm.report.scores",
    "Stats": "vlm.report.scores",
    "Table": "vlm.report.scores",
    "Text": "vlm.report.scores",
    "breakdown": "vlm.report.scores",
    "write_report": "vlm.report.sections",
    "diff": "",
    "metrics": "",
    "tasks": "",
    "towers": "",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.eval import diff as diff
    from vlm.eval import metrics as metrics
    from vlm.eval import tasks as tasks
    from vlm.eval import towers as towers
    from vlm.eval.harness import evaluate as evaluate
    from vlm.eval.harness import evaluate_tasks as evaluate_tasks
    from vlm.eval.job import Options as Options
    from vlm.eval.scoring import score_files as score_files
    from vlm.eval.tables import table as table
    from vlm.eval.towers.run import evaluate_towers as evaluate_towers
    from vlm.generation.predictor import Predictor as Predictor
    from vlm.report.charts import Curve as Curve
    from vlm.report.charts import Dot as Dot
    from vlm.report.charts import Scatter as Scatter
    from vlm.report.scores import Score as Score
    from vlm.report.scores import Scores as Scores
    from vlm.report.scores import Stat as Stat
    from vlm.report.scores import Stats as Stats
    from vlm.report.scores import Table as Table
    from vlm.report.scores import Text as Text
    from vlm.report.scores import breakdown as breakdown
    from vlm.report.sections import Curves as Curves
    from vlm.report.sections import Figure as Figure
    from vlm.report.sections import Gallery as Gallery
    from vlm.report.sections import GalleryItem as GalleryItem
    from vlm.report.sections import write_report as write_report

__getattr__, __dir__ = door(__name__, _HOMES)
