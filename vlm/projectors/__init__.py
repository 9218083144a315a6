"""Projectors, one file each; the file name is the projector's kind. A file defines `SPEC`, a
`vlm.projectors.contract.Spec`, and nothing else is needed."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {"Grid": "contract", "Spec": "contract", "at_least": "contract", "on_grids": "contract"}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.projectors.contract import Grid as Grid
    from vlm.projectors.contract import Spec as Spec
    from vlm.projectors.contract import at_least as at_least
    from vlm.projectors.contract import on_grids as on_grids

__getattr__, __dir__ = door(__name__, _HOMES)
