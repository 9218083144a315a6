"""SigLIP's own uses: its text side, zero-shot classification, features of a tower."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "text": "",
    "zero_shot": "",
    **dict.fromkeys(("canonicalize", "from_big_vision", "load"), "text"),
    "SigLIP": "vlm.model.dual",
    "ProbeResult": "features",
    "check_ids": "sets",
    "check_sets": "sets",
    "check_templates": "sets",
    "images_in_both": "sets",
    "why_no_zero_shot": "zero_shot",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.model.dual import SigLIP as SigLIP
    from vlm.siglip import text as text
    from vlm.siglip import zero_shot as zero_shot
    from vlm.siglip.features import ProbeResult as ProbeResult
    from vlm.siglip.sets import check_ids as check_ids
    from vlm.siglip.sets import check_sets as check_sets
    from vlm.siglip.sets import check_templates as check_templates
    from vlm.siglip.sets import images_in_both as images_in_both
    from vlm.siglip.text import canonicalize as canonicalize
    from vlm.siglip.text import from_big_vision as from_big_vision
    from vlm.siglip.text import load as load
    from vlm.siglip.zero_shot import why_no_zero_shot as why_no_zero_shot

__getattr__, __dir__ = door(__name__, _HOMES)
