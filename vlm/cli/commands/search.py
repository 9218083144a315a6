"""`vlm search`: what a folder of vectors has for a text or a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlm.cli.options import Command, Place, Shared, chosen_of
from vlm.errors import ConfigError
from vlm.settings import option

_Place: Any = chosen_of(Place, "device")
PORT = 8000


class Device(_Place):
    """Where the model runs"""


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared
    place: Device
    vectors: Path = option("folder of vectors, as `vlm embed` writes it", place=True, metavar="VECTORS")
    queries: list[str] = option(
        "what is looked for, each a query of its own; - reads one a line from stdin",
        default=(),
        place=True,
        metavar="QUERY",
    )
    image: list[str] = option(
        "a picture to look for, again for more: each a query of its own; with QUERY, its rankings are fused with each",
        default=(),
        metavar="FILE",
        single=True,
    )
    k: int = option("so many results of each query, fewer where there are fewer", default=10, flags=("-k",), least=1)
    where: list[str] = option(
        "search only entries whose metadata hold it; again for more: of one key any value, of several keys all",
        default=(),
        metavar="KEY=VALUE",
        single=True,
    )
    model: str | None = option(
        "the model that asks, where the one that made the vectors has moved; another one is refused",
        default=None,
        flags=("-m",),
    )
    index: Literal["flat", "ivf", "hnsw"] | None = option(
        "search through an index; without a QUERY it is built beside the vectors and its recall printed",
        default=None,
        shown="exact search",
    )
    engine: Literal["faiss", "usearch"] = option("the library of the index, an extra", default="faiss")
    json: bool = option("print one JSON object a query", default=False)
    html: Path | None = option("write a page with the pictures that were found", default=None, metavar="FILE")
    serve: bool = option("a page with a search box instead, for this machine alone, until Ctrl-C", default=False)
    port: int | None = option(
        "where the page is served; 0: any free port", default=None, metavar="N", least=0, shown=str(PORT)
    )


def run(options: Options) -> int:
    """Results on stdout, best first; what concerns a query as a whole on stderr."""
    _check(options)
    from vlm.cli import searching
    from vlm.cli.vectors import Opened
    from vlm.siglip.loading import load

    index = None if options.index is None else (options.index, options.engine)
    asked = options.queries or options.image or options.serve
    opened = Opened(options.vectors, load, options.model, options.place.device, index)
    if index and not asked:
        return searching.build(opened, *index)
    if options.serve:
        return searching.serve(opened, PORT if options.port is None else options.port)
    asking = searching.Asking(options.queries, options.image, options.k, options.where)
    return searching.search(opened, asking, as_json=options.json, html=options.html)


def _check(options: Options) -> None:
    """Raise ConfigError for options that do not go together; before anything is loaded."""
    if not options.serve:
        if not options.queries and not options.image and not options.index:
            raise ConfigError("nothing to look for; give a QUERY, --image FILE, or --serve for a page that asks")
        if options.port is not None:
            raise ConfigError("--port without --serve")
        return
    given: dict[str, object] = {"QUERY": options.queries, "--image": options.image, "--where": options.where}
    given |= {"--json": options.json, "--html": options.html}
    if found := [name for name, value in given.items() if value]:
        raise ConfigError(f"--serve with {', '.join(found)}: its page asks by itself; leave one of them out")


COMMAND = Command(
    name="search",
    help="search embedded pictures or texts",
    details=(
        "Exact, by cosine similarity; a text and a picture together by reciprocal rank fusion. The model is the one"
        " that made the vectors."
    ),
    options=Options,
    run=run,
    group="use",
)
