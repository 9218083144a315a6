"""Decoders, one file each; the file name is transformers' `model_type`. A file defines `SPEC`, a
`vlm.decoders.contract.Spec`, and nothing else is needed."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {"Facts": "contract", "Spec": "contract"}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.decoders.contract import Facts as Facts
    from vlm.decoders.contract import Spec as Spec

__getattr__, __dir__ = door(__name__, _HOMES)
