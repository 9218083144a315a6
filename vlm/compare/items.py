"""What a finished run said to each item of a task, and how it was scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def item_scores(folder: Path, task: str, metric: str) -> dict[str, float]:
    """Item id -> score of a finished run."""
    return {item["id"]: item["scores"][metric] for item in read_items(folder, task)}


def read_items(folder: Path, task: str) -> list[dict[str, Any]]:
    """What the evaluation of a finished run wrote about each item."""
    lines = (folder / "eval" / task / "items.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]
