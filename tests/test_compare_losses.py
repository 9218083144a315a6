"""`scripts/compare_losses.py`: equal code is equal, and a loss that changed is found and named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "compare_losses.py"
CASE = ["--cases", "siglip-gemma2", "--steps", "2"]
LOSS = 'F.cross_entropy(logits, target, reduction="none")'
"""Looked for in the copied tree: whatever module holds it."""


def compared(old: str | Path, new: str | Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, report and table."""
    words = [sys.executable, str(SCRIPT), str(old), str(new), *CASE, *options]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def changed(folder: Path, text: str, other: str) -> Path:
    """A copy of the package with another text in the one place where it stands."""
    shutil.copytree(ROOT / "vlm", folder / "vlm", ignore=shutil.ignore_patterns("__pycache__"))
    (path,) = [path for path in sorted((folder / "vlm").rglob("*.py")) if text in path.read_text()]
    path.write_text(path.read_text().replace(text, other))
    return folder


@pytest.mark.slow
def test_a_changed_loss_is_named_equal_code_is_equal_and_broken_code_proves_nothing(tmp_path: Path) -> None:
    """In one test: the first side is run once and kept for the other comparisons."""
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode != 0:
        pytest.skip("no git repository here")
    keep = ["--keep", str(tmp_path / "keep")]
    other = changed(tmp_path / "changed", LOSS, f"1.0000001 * {LOSS}")
    status, report, table = compared("HEAD", other, "--out", str(tmp_path / "out"), *keep)
    assert status == 1 and report["different"] == ["siglip-gemma2"], table
    differences = report["cases"]["siglip-gemma2"]["differences"]
    assert differences[0].startswith("numbers: run/metrics.csv align step 1 loss: ")
    assert any(text.startswith("weights: run/model: ") for text in differences)
    assert "1 different: siglip-gemma2" in table and "old  siglip-gemma2" in table
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == report

    status, report, table = compared("HEAD", "HEAD", *keep)
    assert status == 0 and report["equal"] and "1 cases: all equal" in table, table
    assert "old  siglip-gemma2" not in table and "new  siglip-gemma2" in table
    case = report["cases"]["siglip-gemma2"]
    assert case["steps"] == 4 and case["weights"] > 100 and case["captions"] == 4

    broken = changed(tmp_path / "broken", LOSS, f"undefined * {LOSS}")
    status, report, _ = compared("HEAD", broken, *keep)
    assert status == 1 and "NameError" in str(report["cases"]["siglip-gemma2"]["differences"])


def test_what_is_no_revision_is_refused(tmp_path: Path) -> None:
    status, _, table = compared(tmp_path, ROOT)
    assert status == 2 and table.startswith("error: ") and str(tmp_path) in table
