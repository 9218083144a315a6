"""docs/design.md and its picture say what the code says: the table of rooms, the arrows, the modules of the ground."""

from __future__ import annotations

import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import house  # noqa: E402

PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
PICTURE = (ROOT / "docs" / "images" / "map.svg").read_text(encoding="utf-8")
HOUSE = house.House()
GRAPH = HOUSE.room_graph()


def without_sizes(picture: str) -> str:
    return re.sub(r"\d+ files, [\d,]+ lines", "", picture)


def test_the_table_of_the_page_is_the_one_that_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert house.with_table(PAGE) == PAGE, "run: python scripts/house.py --table docs/design.md"
    for name, room in house.ROOMS.items():
        assert f"| {room.layer} | `{name}` | {room.knows} |" in PAGE
    monkeypatch.setitem(house.ROOMS, "text", house.Room(1, "something else", ("data",)))
    assert "| 1 | `text` | something else | `data` |" in house.with_table(PAGE)
    with pytest.raises(ValueError, match="expected the lines <!-- rooms"):
        house.with_table("no markers")


def test_the_picture_is_that_of_the_imports() -> None:
    assert without_sizes(PICTURE) == without_sizes(house.draw(HOUSE)), (
        "rooms or their imports changed: run python scripts/house.py --map docs/images/map.svg and look at it"
    )
    boxes = re.findall(r'class="name"[^>]*>([^<]*)<', PICTURE)
    assert sorted(boxes[:-1]) == sorted(set(house.ROOMS) - {house.GROUND})
    assert {word.strip() for word in boxes[-1].partition(":")[2].split(",")} == {
        path.stem for path in (ROOT / "vlm").glob("*.py") if not path.stem.startswith("__")
    }
    assert "images/map.svg" in PAGE


def test_arrows_go_down_and_through_no_box() -> None:
    found = house._layout(GRAPH)
    assert len(set(found.places.values())) == len(found.places) >= len(GRAPH)
    for path in found.paths:
        assert all(found.places[upper][1] + house._STEP == found.places[lower][1] for upper, lower in pairwise(path))
    # Whoever follows the arrows reaches every room that a room imports, and no other.
    drawn: dict[str, set[str]] = {name: set() for name in GRAPH}
    for above, *_, below in found.paths:
        drawn[above].add(below)
    assert {name: house.reachable(drawn, name) for name in GRAPH} == {
        name: house.reachable(GRAPH, name) for name in GRAPH
    }


def test_the_numbers_of_the_page_are_those_of_the_test() -> None:
    test = (ROOT / "tests" / "test_house.py").read_text(encoding="utf-8")
    numbers = [re.findall(rf"^MAX_CHAIN_BY_{key} = (\d+)$", test, re.M)[0] for key in ("FILE", "ROOM")]
    assert re.findall(r"longest chain has (\d+) files and (\d+) rooms", PAGE) == [tuple(numbers)]
