"""Pages that answer while they are open, for one person on one machine."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    **dict.fromkeys(("LocalServer", "Request", "Response"), "local"),
    "SearchPages": "search",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.serve.local import LocalServer as LocalServer
    from vlm.serve.local import Request as Request
    from vlm.serve.local import Response as Response
    from vlm.serve.search import SearchPages as SearchPages

__getattr__, __dir__ = door(__name__, _HOMES)
