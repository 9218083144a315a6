"""Every encoder against every point of the contract, as a markdown table.

    python benchmarks/encoder_contract.py [--out FILE]

runs the tests of the encoders with pytest and puts each result in its cell, so the table says what the tests say: `ok`
(with the number of cases), `FAIL`, `skipped` (the reason stands below), or `-` where no test has this point for the
kind. Exits 1 when a cell is FAIL.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONTRACT, TOWERS, LIBRARIES = "test_encoders_contract", "test_encoders_towers", "test_encoders_libraries"
FUSED, NAFLEX, NAFLEX_TOWER, SIGLIP = "test_encoders_fused", "test_naflex", "test_naflex_tower", "test_siglip_positions"

# Point of the contract -> the tests that check it.
POINTS: dict[str, tuple[str, ...]] = {
    "output, grid": (f"{CONTRACT}::test_output_shapes", f"{CONTRACT}::test_each_image_alone_gives_the_same_features"),
    "row order": (f"{CONTRACT}::test_rows_are_in_row_order",),
    "patches only": (f"{CONTRACT}::test_patches_only", f"{CONTRACT}::test_padding_rows_do_not_matter"),
    "own image transform": (
        f"{CONTRACT}::test_the_image_transform_is_the_towers_own_and_recorded",
        f"{LIBRARIES}::test_timms_transform",
        f"{LIBRARIES}::test_open_clips_transform",
        f"{FUSED}::test_all_members_see_the_same_part",
        f"{NAFLEX}::test_transform_pads_and_normalises",
    ),
    "feature layers": (
        f"{CONTRACT}::test_feature_layers",
        f"{TOWERS}::test_several_layers_and_nothing_unused",
        f"{LIBRARIES}::test_layers_of_timm_models",
        f"{LIBRARIES}::test_layers_of_open_clip_towers",
        f"{FUSED}::test_layers_of_every_member",
    ),
    "another size": (
        f"{CONTRACT}::test_another_image_size",
        f"{TOWERS}::test_another_image_size_as_transformers_does_it",
        f"{LIBRARIES}::test_another_image_size_as_timm_does_it",
        f"{LIBRARIES}::test_another_image_size_as_open_clip_does_it",
        f"{FUSED}::test_sizes_of_their_own",
        f"{SIGLIP}::test_it_is_linear_interpolation_between_corners",
        f"{NAFLEX}::test_position_grid_resize_equals_weight_matrices",
    ),
    "cut pixels said": (f"{CONTRACT}::test_pixels_that_are_never_seen_are_said",),
    "frozen, trained": (f"{CONTRACT}::test_a_frozen_tower_is_still",),
    "gradients": (f"{CONTRACT}::test_gradient_reaches_every_parameter",),
    "bfloat16": (f"{CONTRACT}::test_bfloat16",),
    "tiny": (f"{CONTRACT}::test_tiny_is_tiny",),
    "parity 1e-5": (
        f"{TOWERS}::test_features_are_transformers_own",
        f"{LIBRARIES}::test_features_are_timms",
        f"{LIBRARIES}::test_features_are_open_clips",
        f"{FUSED}::test_features_are_the_members_side_by_side",
        f"{NAFLEX_TOWER}::test_values_and_gradients_are_transformers",
    ),
    "learns, saved": (f"{TOWERS}::test_each_tower_learns",),
}
FILES = {FUSED: "fused", NAFLEX: "siglip2_naflex", NAFLEX_TOWER: "siglip2_naflex", SIGLIP: "siglip"}
"""Kind that a file is about, where its tests have none as a parameter."""


class Outcome(NamedTuple):
    """What one test said."""

    kind: str
    point: str
    status: str
    """passed, failed or skipped."""
    reason: str


class Collector:
    """A pytest plugin: the outcome of each test of the contract."""

    def __init__(self) -> None:
        self.places: dict[str, tuple[str, str]] = {}
        self.outcomes: list[Outcome] = []

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Keep the tests of the contract, and note which cell each belongs to."""
        points = {test: point for point, tests in POINTS.items() for test in tests}
        kept = []
        for item in items:
            point = points.get(f"{item.path.stem}::{item.originalname}")
            if point is not None:
                self.places[item.nodeid] = (kind_of(item), point)
                kept.append(item)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
        missing = set(points) - {f"{item.path.stem}::{item.originalname}" for item in kept}
        if missing:
            raise pytest.UsageError(f"no such tests: {', '.join(sorted(missing))}")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test fails in any phase; it passes or is skipped once."""
        if report.when == "call" or report.outcome != "passed":
            reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
            self.outcomes.append(Outcome(*self.places[report.nodeid], report.outcome, reason.removeprefix("Skipped: ")))


def kind_of(item: Any) -> str:
    """The encoder kind that a test is about."""
    params = getattr(item, "callspec", None) and item.callspec.params
    if params and "kind" in params:
        return str(params["kind"])
    if params and item.path.stem == TOWERS:
        return str(item.module.THEIRS[params["name"]][0])
    if item.path.stem == LIBRARIES:
        return "open_clip" if "open_clip" in item.originalname else "timm"
    return FILES[item.path.stem]


def table(outcomes: list[Outcome]) -> str:
    """Kinds down, points across; the reasons of skipped tests below."""
    cells: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        cells[outcome.kind, outcome.point].append(outcome)
    kinds = sorted({outcome.kind for outcome in outcomes})
    lines = ["| kind | " + " | ".join(POINTS) + " |", "|---|" + "---|" * len(POINTS)]
    lines += [f"| `{kind}` | " + " | ".join(cell(cells[kind, point]) for point in POINTS) + " |" for kind in kinds]
    reasons = sorted({outcome.reason for outcome in outcomes if outcome.status == "skipped"})
    return "\n".join([*lines, *(["", *(f"skipped: {reason}" for reason in reasons)] if reasons else [])])


def cell(outcomes: list[Outcome]) -> str:
    """One cell: any failure is a FAIL, any skip shows."""
    statuses = [outcome.status for outcome in outcomes]
    if not statuses:
        return "-"
    if "failed" in statuses:
        return f"FAIL {statuses.count('failed')}/{len(statuses)}"
    if "skipped" in statuses:
        return "skipped" if set(statuses) == {"skipped"} else f"ok {statuses.count('passed')}, some skipped"
    return f"ok {len(statuses)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there too")
    options = parser.parse_args()
    collector = Collector()
    files = sorted({test.split("::")[0] for tests in POINTS.values() for test in tests})
    sys.stdout, stdout = sys.stderr, sys.stdout  # pytest's own report is progress
    try:
        code = pytest.main(["-q", "--tb=short", *(str(ROOT / "tests" / f"{name}.py") for name in files)], [collector])
    finally:
        sys.stdout = stdout
    if not collector.outcomes:
        return int(code) or 1
    print(table(collector.outcomes))
    if options.out is not None:
        options.out.write_text(table(collector.outcomes) + "\n", encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
