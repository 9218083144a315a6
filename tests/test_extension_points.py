"""Each extension point takes one more from outside, with one new file and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vlm.check.checks
from vlm import check
from vlm.build.presets import tiny
from vlm.check import runner

A_CHECK = """
from vlm.check.report import Finding
from vlm.check.subject import Check, Subject


def finite(subject: Subject) -> Finding:
    wrong = sum(int((~weight.isfinite()).sum()) for weight in subject.model.parameters())
    return Finding(measured=wrong, limit=0, detail="weights that are NaN or infinite")


CHECKS = (Check("finite", "every weight is a number", finite, runs_tower=False),)
"""


def test_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "finite.py").write_text(A_CHECK)
    monkeypatch.setattr(vlm.check.checks, "__path__", [*vlm.check.checks.__path__, str(tmp_path)])
    known = [entry.name for entry in runner.CHECKS]
    monkeypatch.setattr(runner, "CHECKS", runner.find())
    assert [entry.name for entry in runner.CHECKS] == [*known, "finite"]
    model, processor = tiny("siglip", "gemma")
    assert check.run(model, processor, only=["finite"])["finite"].status == "ok"
    with torch.no_grad():
        next(model.parameters()).view(-1)[:3] = torch.nan
    result = check.run(model, processor, only=["finite", "tied-weights"])["finite"]
    assert result.status == "FAIL" and result.measured == 3
