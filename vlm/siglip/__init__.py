"""SigLIP's own uses: its text side, zero-shot classification, features of a tower."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "SigLIP": "vlm.model.dual",
    "canonicalize": "text",
    "load": "text",
    "from_big_vision": "text",
    "zero_shot": "",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.model.dual import SigLIP as SigLIP
    from vlm.siglip import zero_shot as zero_shot
    from vlm.siglip.text import canonicalize as canonicalize
    from vlm.siglip.text import from_big_vision as from_big_vision
    from vlm.siglip.text import load as load

__getattr__, __dir__ = door(__name__, _HOMES)
