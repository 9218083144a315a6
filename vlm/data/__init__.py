"""Examples and their checks, official files of benchmarks, the order of training."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "Example": "examples",
    "Labelled": "examples",
    "Problem": "examples",
    "read_jsonl": "examples",
    "read_labelled": "examples",
    "content": "",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.data import content as content
    from vlm.data.examples import Example as Example
    from vlm.data.examples import Labelled as Labelled
    from vlm.data.examples import Problem as Problem
    from vlm.data.examples import read_jsonl as read_jsonl
    from vlm.data.examples import read_labelled as read_labelled

__getattr__, __dir__ = door(__name__, _HOMES)
