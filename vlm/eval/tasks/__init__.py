"""Evaluation tasks as declarative files: official data in, prompts, decoding and metrics fixed.

from vlm.eval import tasks
task = tasks.get("vqav2")
examples = task.load(Path("data"), limit=100)
"""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    **dict.fromkeys(("POST", "Published", "Split", "TaskDecoding", "fill"), "task"),
    **dict.fromkeys(("Selected", "get", "load_file", "names", "select", "table"), "catalogue"),
    "Task": "loading",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.eval.tasks.catalogue import Selected as Selected
    from vlm.eval.tasks.catalogue import get as get
    from vlm.eval.tasks.catalogue import load_file as load_file
    from vlm.eval.tasks.catalogue import names as names
    from vlm.eval.tasks.catalogue import select as select
    from vlm.eval.tasks.catalogue import table as table
    from vlm.eval.tasks.loading import Task as Task
    from vlm.eval.tasks.task import POST as POST
    from vlm.eval.tasks.task import Published as Published
    from vlm.eval.tasks.task import Split as Split
    from vlm.eval.tasks.task import TaskDecoding as TaskDecoding
    from vlm.eval.tasks.task import fill as fill

__getattr__, __dir__ = door(__name__, _HOMES)
