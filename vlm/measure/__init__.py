"""What a model costs and what its tower knows: sizes, time, memory, probes."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "cost": "",
    "info": "",
    "probes": "",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.measure import cost as cost
    from vlm.measure import info as info
    from vlm.measure import probes as probes

__getattr__, __dir__ = door(__name__, _HOMES)
