"""Examples and their checks, official files of benchmarks, the order of training."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "Example": "examples",
    "Labelled": "examples",
    "Problem": "problems",
    "listing": "problems",
    "read": "reading",
    "read_labelled": "reading",
    "without_control": "control",
    "content": "",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.data import content as content
    from vlm.data.control import without_control as without_control
    from vlm.data.examples import Example as Example
    from vlm.data.examples import Labelled as Labelled
    from vlm.data.problems import Problem as Problem
    from vlm.data.problems import listing as listing
    from vlm.data.reading import read as read
    from vlm.data.reading import read_labelled as read_labelled

__getattr__, __dir__ = door(__name__, _HOMES)
