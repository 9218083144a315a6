"""New models from parts, and presets."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "presets": "",
    "towers": "",
    "new": "assembly",
    "stored_rows": "assembly",
    "Choice": "choice",
    "choose": "towers",
    "sized": "towers",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.build import presets as presets
    from vlm.build import towers as towers
    from vlm.build.assembly import new as new
    from vlm.build.assembly import stored_rows as stored_rows
    from vlm.build.choice import Choice as Choice
    from vlm.build.towers import choose as choose
    from vlm.build.towers import sized as sized

__getattr__, __dir__ = door(__name__, _HOMES)
