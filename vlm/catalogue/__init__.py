"""What Google has released: every SigLIP, SigLIP 2 and PaliGemma checkpoint as data, and how to choose one."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    **dict.fromkeys(("Checkpoint", "find", "load"), "released"),
    **dict.fromkeys(("Pick", "memory_bytes", "picks", "uses"), "choice"),
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.catalogue.choice import Pick as Pick
    from vlm.catalogue.choice import memory_bytes as memory_bytes
    from vlm.catalogue.choice import picks as picks
    from vlm.catalogue.choice import uses as uses
    from vlm.catalogue.released import Checkpoint as Checkpoint
    from vlm.catalogue.released import find as find
    from vlm.catalogue.released import load as load

__getattr__, __dir__ = door(__name__, _HOMES)
