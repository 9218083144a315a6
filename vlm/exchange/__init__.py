"""Models in and out of other formats, with the proof that nothing changed."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "export": "exporting",
    "convert": "importing",
}
__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.exchange.exporting import export as export
    from vlm.exchange.importing import convert as convert

__getattr__, __dir__ = door(__name__, _HOMES)
