"""Models in and out of other formats, with the proof that nothing changed."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "export": "exporting",
    "convert": "importing",
    "preprocessor_values": "hub_files",
    "convert_pickle": "pickled",
    "check_out": "publishing",
    "published": "publishing",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.exchange.exporting import export as export
    from vlm.exchange.hub_files import preprocessor_values as preprocessor_values
    from vlm.exchange.importing import convert as convert
    from vlm.exchange.pickled import convert_pickle as convert_pickle
    from vlm.exchange.publishing import check_out as check_out
    from vlm.exchange.publishing import published as published

__getattr__, __dir__ = door(__name__, _HOMES)
