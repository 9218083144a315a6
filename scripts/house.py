"""The house as it is built: which file imports which, how long the chains are, what each room weighs; and its picture.

    python scripts/house.py                     a table: rooms, circles, the longest chains
    python scripts/house.py --json              the same as JSON
    python scripts/house.py --map FILE.svg      the picture of docs/design.md
    python scripts/house.py --table FILE.md     the table of rooms between the two markers of that page

Every import counts: at the top of a file, inside functions, for the type checker alone, and by computed names (a room
given as text to `vlm.registry`, the table of names of a door, `module:function` of a command). `tests/test_house.py`
holds the table of rooms below against what is found here.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise, permutations
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vlm"
GROUND = "ground"


class Room(NamedTuple):
    """A row of the table: what a room knows, and which rooms of its own layer and below it may import."""

    layer: int
    knows: str
    imports: tuple[str, ...]


ROOMS: dict[str, Room] = {
    GROUND: Room(0, "errors, settings, files, ranks, the registry of kinds: no tensor and no picture", ()),
    "images": Room(1, "pixels: any file to RGB, the recorded transform, resizing, NaFlex grids", ()),
    "text": Room(1, "tokens: tokenizers, the prompt format, `<loc>` text, control spellings", ()),
    "report": Room(1, "pages, charts and tables that load nothing from elsewhere", ("images",)),
    "data": Room(1, "examples and their checks, one reader per file format and benchmark, order", ("images", "text")),
    "catalogue": Room(1, "the released checkpoints as data, and how to choose one", ()),
    "encoders": Room(2, "vision towers, one file each", ("images",)),
    "projectors": Room(2, "tower width to decoder width, one file each", ()),
    "decoders": Room(2, "language models (Gemma), one file each", ()),
    "model": Room(
        3,
        "VLM and the two towers of SigLIP: configuration, processor and Batch, masks, forward, loss",
        ("encoders", "projectors", "decoders", "images", "text", "data"),
    ),
    "checkpoints": Room(4, "model directories: open and save, whole or by part; one digest of a model", ("model",)),
    "generation": Room(4, "the engine that answers prompts, decoding, beams, likelihood, the journal", ("model",)),
    "build": Room(4, "new models from parts", ("checkpoints",)),
    "siglip": Room(4, "SigLIP's own uses: its text side, zero-shot, features of a tower", ("checkpoints",)),
    "exchange": Room(
        4, "import and export of other formats, with their proof", ("checkpoints", "siglip", "generation")
    ),
    "measure": Room(4, "cost, probes, what a model is made of", ("checkpoints", "siglip", "generation")),
    "eval": Room(
        5,
        "metrics (they never see a model), tasks, the harness, statistics",
        ("generation", "report", "checkpoints", "catalogue"),
    ),
    "serve": Room(5, "pages that answer while they are open, on this machine alone", ("siglip", "report")),
    "train": Room(5, "run -> stage -> step; objectives, records", ("eval", "build")),
    "check": Room(5, "what a model does, and what it should", ("train", "exchange", "measure", "build")),
    "compare": Room(6, "towers and projectors against each other", ("train", "measure")),
    "demo": Room(6, "the small world of the first command", ("train", "measure", "exchange")),
    "cli": Room(6, "the commands; nobody imports it", ("compare", "demo", "check", "serve", "catalogue")),
}
"""The table of rooms. A room may import what its row names, and whatever those may."""

TOP, LATE, TYPE, COMPUTED = "top", "in a function", "for the type checker", "computed"


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    line: int
    kind: str

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported} ({self.kind})"


class House:
    """All files of the package and what they import.

    Args:
        root: the folder that holds the package.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.files = {_module(root, path): path for path in sorted((root / PACKAGE).rglob("*.py"))}
        self.doors = {name for name, path in self.files.items() if path.name == "__init__.py"}
        self.trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.files.items()}
        self.lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in self.files.items()}
        self.imports = [found for name in self.files for found in self._imports(name)]

    def own(self) -> list[Import]:
        """Imports of the package's own files."""
        return [found for found in self.imports if found.imported in self.files and found.imported != found.importer]

    def graph(self) -> dict[str, set[str]]:
        """File -> files that it imports."""
        graph: dict[str, set[str]] = {name: set() for name in self.files}
        for found in self.own():
            graph[found.importer].add(found.imported)
        return graph

    def room_graph(self) -> dict[str, set[str]]:
        """Room -> rooms that its files import; the ground and `vlm` itself left out."""
        graph: dict[str, set[str]] = {name: set() for name in ROOMS if name != GROUND}
        for found in self.own():
            above, below = room(found.importer), room(found.imported)
            if above != below and GROUND not in (above, below):
                graph.setdefault(above, set()).add(below)
        return graph

    def kinds(self, package: str) -> Iterator[str]:
        """The files of a room that are its kinds."""
        for name in self.files:
            parent, _, leaf = name.rpartition(".")
            if parent == package and not leaf.startswith("_") and leaf != "contract":
                yield name

    def _imports(self, name: str) -> Iterator[Import]:
        pending: list[tuple[ast.AST, str]] = [(self.trees[name], TOP)]
        while pending:
            node, kind = pending.pop()
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and kind == TOP:
                kind = LATE
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                pending += [(child, TYPE) for child in node.body]
                pending += [(child, kind) for child in node.orelse]
                continue
            pending += [(child, kind) for child in ast.iter_child_nodes(node)]
            if isinstance(node, ast.Import):
                yield from (Import(name, self._known(alias.name), node.lineno, kind) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self._base(name, node)
                for alias in node.names:  # `from package import module` imports the module
                    full = f"{base}.{alias.name}"
                    yield Import(name, full if full in self.files else self._known(base), node.lineno, kind)
            elif isinstance(node, ast.Call | ast.Assign):
                yield from self._computed(name, node)

    def _base(self, name: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parents = (name if name in self.doors else name.rpartition(".")[0]).split(".")
        return ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])

    def _known(self, name: str) -> str:
        """The file behind a dotted name of ours; another library's name as it is."""
        while name.startswith(PACKAGE + ".") and name not in self.files:
            name = name.rpartition(".")[0]
        return name

    def _computed(self, name: str, node: ast.Call | ast.Assign) -> Iterator[Import]:
        """Imports by a name that is data: of every kind of a room, by the table of a door, of a command's function."""
        if isinstance(node, ast.Call):
            if "getLogger" in ast.unparse(node.func):
                return
            for word in (*node.args, *(key.value for key in node.keywords)):
                text = self._text(name, word)
                module, _, function = text.partition(":")
                if text in self.doors and text != PACKAGE:
                    yield from (Import(name, kind, node.lineno, COMPUTED) for kind in self.kinds(text) if kind != name)
                elif function and module in self.files:
                    yield Import(name, module, node.lineno, COMPUTED)
        elif name in self.doors and any(ast.unparse(target) == "_HOMES" for target in node.targets):
            yield from (Import(name, home, node.lineno, COMPUTED) for home in self._homes(name, node.value))

    def _text(self, name: str, word: ast.expr) -> str:
        """A text as it is written, or the constant of the file that is named; "" for anything else."""
        if isinstance(word, ast.Constant) and isinstance(word.value, str):
            return word.value
        if isinstance(word, ast.Name):
            for node in self.trees[name].body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == word.id:
                    return (
                        node.value.value
                        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
                        else ""
                    )
        return ""

    def _homes(self, name: str, table: ast.AST) -> Iterator[str]:
        for node in ast.walk(table):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value:
                for full in (f"{name}.{node.value}", node.value):
                    if full in self.files and full not in (name, PACKAGE):
                        yield full


def _module(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """The room of a file; of those directly in the package the ground, and of what only starts a command `cli`."""
    parts = module.split(".")
    if module == f"{PACKAGE}.__main__":
        return "cli"
    if len(parts) > 1 and (ROOT / PACKAGE / parts[1]).is_dir():
        return parts[1]
    return GROUND


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan's strongly connected components of more than one node)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in order:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in order:
            visit(node)
    return found


def longest_chain(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """The longest path through a graph without circles, from the top down.

    Raises:
        ValueError: there is a circle.
    """
    found = circles(graph)
    if found:
        raise ValueError(f"imports go in a circle: {' <-> '.join(found[0])}")
    known: dict[str, list[str]] = {}

    def below(node: str) -> list[str]:
        if node not in known:
            known[node] = [node, *max((below(other) for other in graph.get(node, ())), key=len, default=[])]
        return known[node]

    return max((below(node) for node in graph), key=len)


def reachable(graph: Mapping[str, Iterable[str]], start: str) -> set[str]:
    """Every node below `start`."""
    seen: set[str] = set()
    pending = list(graph.get(start, ()))
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += graph.get(node, ())
    return seen


def allowed() -> dict[str, set[str]]:
    """Room -> every room that it may import, by the table."""
    table = {name: one.imports for name, one in ROOMS.items()}
    return {name: reachable(table, name) | {name, GROUND} for name in ROOMS}


def facts(house: House) -> dict[str, Any]:
    """The figures of the house."""
    graph, rooms = house.graph(), house.room_graph()
    sizes = dict.fromkeys(ROOMS, 0)
    for name, count in house.lines.items():
        sizes[room(name)] = sizes.get(room(name), 0) + count
    total = sum(sizes.values())
    round_by_file, round_by_room = circles(graph), circles(rooms)
    return {
        "lines": total,
        "files": len(house.files),
        "chain_by_file": [] if round_by_file else longest_chain(graph),
        "chain_by_room": [] if round_by_room else longest_chain(rooms),
        "circles": round_by_file + round_by_room,
        "top": sorted(name for name in house.files if name.count(".") == 1 and name not in house.doors),
        "rooms": {name: {"lines": count, "share": round(count / total, 4)} for name, count in sizes.items()},
    }


def table(found: Mapping[str, Any]) -> str:
    """The figures as text."""
    rooms: Mapping[str, Mapping[str, float]] = found["rooms"]
    chain: Mapping[str, list[str]] = {key: found[f"chain_by_{key}"] for key in ("file", "room")}
    lines = [f"{found['files']} files, {found['lines']} lines"]
    lines += [f"  {name:12} {one['lines']:6} {100 * one['share']:5.1f} %" for name, one in rooms.items()]
    lines += [f"longest chain by {key}: {len(names)}: {' > '.join(names)}" for key, names in chain.items()]
    lines += [f"directly in the package: {len(found['top'])}", f"circles: {found['circles'] or 'none'}"]
    return "\n".join(lines)


# --- the table and the picture of docs/design.md ----------------------------------------------------------------------

BEGIN, END = "<!-- rooms: scripts/house.py --table -->", "<!-- end of rooms -->"


def rows() -> list[str]:
    """The table of rooms as lines of Markdown, from the top of the house down."""
    lines = ["| layer | room | what it knows | may import, and what those may |", "|---|---|---|---|"]
    for name, one in reversed(ROOMS.items()):
        names = ", ".join(f"`{other}`" for other in one.imports) or ("-" if name == GROUND else "the ground alone")
        lines.append(f"| {one.layer} | `{name}` | {one.knows} | {names} |")
    return lines


def with_table(page: str) -> str:
    """A page with the table of rooms between its two markers.

    Raises:
        ValueError: the page does not have both markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the lines {BEGIN} and {END} in the page, around the table")
    return "\n".join([before + BEGIN, "", *rows(), "", END + after])


_WIDTH, _HEIGHT, _GAP, _STEP, _MARGIN = 140, 42, 26, 86, 24


class _Layout(NamedTuple):
    places: Mapping[str, tuple[float, float]]
    """Room, or where an arrow passes a row -> (middle, top)."""
    paths: list[list[str]]
    """From a room to one that it imports, through a place in each row between."""
    size: tuple[float, float]


def draw(house: House) -> str:
    """The rooms as SVG, all arrows downwards: one to each room that is imported and not also reached by another."""
    found = _layout(house.room_graph())
    width, height = found.size
    parts = [_arrow([found.places[name] for name in path]) for path in found.paths]
    parts += [_box(name, place, house) for name, place in found.places.items() if name in ROOMS]
    parts.append(_ground(width, height - _HEIGHT - _MARGIN, house))
    return "\n".join([_head(width, height), *parts, "</svg>", ""])


def _layout(graph: Mapping[str, set[str]]) -> _Layout:
    arrows, row_of = _direct(graph), _rows_of(graph)
    paths = [
        [above, *(f"{above} > {below} in row {row}" for row in range(row_of[above] + 1, row_of[below])), below]
        for above, below in arrows
    ]
    rows: dict[int, list[str]] = {number: [] for number in range(max(row_of.values()) + 1)}
    for name in graph:
        rows[row_of[name]].append(name)
    for path in paths:
        for number, name in enumerate(path[1:-1], row_of[path[0]] + 1):
            rows[number].append(name)
    links = [pair for path in paths for pair in pairwise(path)]
    for _ in range(4):  # each row as its neighbours like it best, until nothing changes any more
        for number in rows:
            rows[number] = min(map(list, permutations(rows[number])), key=partial(_length, rows, links, number))
    across = max(map(len, rows.values())) * (_WIDTH + _GAP) - _GAP + 2 * _MARGIN
    places = {
        name: (across / 2 + x * (_WIDTH + _GAP), _MARGIN + number * _STEP)
        for number, names in rows.items()
        for name, x in _middles(names).items()
    }
    return _Layout(places, paths, (across, len(rows) * _STEP + _HEIGHT + 2 * _MARGIN))


def _rows_of(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """The row of each room, 0 at the top: below all that import it, and as high as that."""
    known: dict[str, int] = {}

    def row(name: str) -> int:
        if name not in known:
            known[name] = max((row(above) + 1 for above, names in graph.items() if name in names), default=0)
        return known[name]

    return {name: row(name) for name in graph}


def _middles(names: Sequence[str]) -> dict[str, float]:
    return {name: place - (len(names) - 1) / 2 for place, name in enumerate(names)}


def _length(
    rows: Mapping[int, list[str]], links: Sequence[tuple[str, str]], number: int, order: Sequence[str]
) -> float:
    """How far the arrows of a row go sideways in this order of its rooms, and how often they cross."""
    above, own, below = _middles(rows.get(number - 1, [])), _middles(order), _middles(rows.get(number + 1, []))
    total = 0.0
    for upper, lower in ((above, own), (own, below)):
        lines = [(upper[one], lower[other]) for one, other in links if one in upper and other in lower]
        total += sum(abs(x0 - x1) for x0, x1 in lines)
        total += 2 * sum((a0 - b0) * (a1 - b1) < 0 for (a0, a1), (b0, b1) in combinations(lines, 2))
    return total


def _direct(graph: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that say something: not those to a room that is reached through another one."""
    return [
        (above, below)
        for above, names in sorted(graph.items())
        for below in sorted(names)
        if not any(below in reachable(graph, other) for other in names if other != below)
    ]


def _head(width: float, height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif">\n'
        "<style>.box{fill:#eef3fb;stroke:#4a6fa5}.ground{fill:#f1ede4;stroke:#8a7d5f}.line{stroke:#7f8ea3;fill:none;"
        "stroke-width:1.3}.name{font-size:15px;fill:#16202e}.size{font-size:11px;fill:#5a6675}</style>\n"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#7f8ea3"/></marker></defs>\n'
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>'
    )


def _arrow(places: Sequence[tuple[float, float]]) -> str:
    """From the foot of a room to the head of another, straight down through the rows between."""
    x, y = places[0][0], places[0][1] + _HEIGHT
    path = f"M{x:g} {y:g}"
    for number, (across, top) in enumerate(places[1:], 1):
        middle = (y + top) / 2
        path += f" C{x:g} {middle:g} {across:g} {middle:g} {across:g} {top:g}"
        x, y = across, top
        if number < len(places) - 1:
            y += _HEIGHT
            path += f" V{y:g}"
    return f'<path class="line" d="{path}" marker-end="url(#tip)"/>'


def _box(name: str, place: tuple[float, float], house: House) -> str:
    count = sum(lines for module, lines in house.lines.items() if room(module) == name)
    files = sum(room(module) == name for module in house.files)
    x, y = place[0] - _WIDTH / 2, place[1]
    return (
        f'<rect class="box" x="{x:g}" y="{y:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="6"/>'
        f'<text class="name" x="{x + 10:g}" y="{y + 18:g}">{escape(name)}</text>'
        f'<text class="size" x="{x + 10:g}" y="{y + 34:g}">{files} files, {round(count, -2):,} lines</text>'
        f"<title>{escape(ROOMS[name].knows)}</title>"
    )


def _ground(width: float, y: float, house: House) -> str:
    names = sorted(name.split(".")[1] for name in house.files if room(name) == GROUND and name != PACKAGE)
    return (
        f'<rect class="ground" x="{_MARGIN}" y="{y:g}" width="{width - 2 * _MARGIN:g}" height="{_HEIGHT}" rx="6"/>'
        f'<text class="name" x="{_MARGIN + 12}" y="{y + 26:g}">ground, used by all: {escape(", ".join(names))}</text>'
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder that holds the package")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--map", type=Path, metavar="FILE", help="write the picture as SVG")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table of rooms into a page")
    options = parser.parse_args(argv)
    house = House(options.root)
    if options.table:
        options.table.write_text(with_table(options.table.read_text(encoding="utf-8")), encoding="utf-8")
    if options.map:
        options.map.write_text(draw(house), encoding="utf-8")
    found = facts(house)
    print(json.dumps(found, indent=1) if options.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
