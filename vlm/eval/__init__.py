"""Evaluation: metrics that stand alone, the harness that predicts and scores, and the HTML report.

Names resolve lazily: `vlm.eval.metrics` is usable without torch, and nothing here imports the training code.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# public name -> the module that defines it
_HOMES = {
    "evaluate": "harness",
    "evaluate_tasks": "suite",
    "Options": "job",
    "Predictor": "predictor",
    "table": "tables",
    "score_files": "scoring",
    "write_report": "report",
    "breakdown": "report",
    "Curve": "charts",
    "Curves": "report",
    "Figure": "report",
    "Gallery": "report",
    "GalleryItem": "report",
    "Score": "report",
    "Scores": "report",
    "Stat": "report",
    "Stats": "report",
    "Table": "report",
    "Text": "report",
    "diff": "",
    "metrics": "",
    "tasks": "",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from . import diff as diff
    from . import metrics as metrics
    from . import tasks as tasks
    from .charts import Curve as Curve
    from .harness import evaluate as evaluate
    from .job import Options as Options
    from .predictor import Predictor as Predictor
    from .report import Curves as Curves
    from .report import Figure as Figure
    from .report import Gallery as Gallery
    from .report import GalleryItem as GalleryItem
    from .report import Score as Score
    from .report import Scores as Scores
    from .report import Stat as Stat
    from .report import Stats as Stats
    from .report import Table as Table
    from .report import Text as Text
    from .report import breakdown as breakdown
    from .report import write_report as write_report
    from .scoring import score_files as score_files
    from .suite import evaluate_tasks as evaluate_tasks
    from .tables import table as table


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlm.eval' has no attribute {name!r}; it has {', '.join(__all__)}")
    home = _HOMES[name]
    value = getattr(import_module(f"vlm.eval.{home}"), name) if home else import_module(f"vlm.eval.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
