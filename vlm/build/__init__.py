"""New models from parts, and presets."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "new": "assembly",
    "presets": "",
    "towers": "",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.build import presets as presets
    from vlm.build import towers as towers
    from vlm.build.assembly import new as new

__getattr__, __dir__ = door(__name__, _HOMES)
