"""Evaluation tasks as declarative files: official data in, prompts, decoding and metrics fixed.

from vlm.eval import tasks
task = tasks.get("vqav2")
examples = task.load(Path("data"), limit=100)
"""

from vlm.data.source import File, Item, Row, Source
from vlm.eval.tasks.catalogue import Selected, get, load_file, names, select, table
from vlm.eval.tasks.task import POST, Published, Split, Task, TaskDecoding, fill

__all__ = [
    "POST",
    "File",
    "Item",
    "Published",
    "Row",
    "Selected",
    "Source",
    "Split",
    "Task",
    "TaskDecoding",
    "fill",
    "get",
    "load_file",
    "names",
    "select",
    "table",
]
