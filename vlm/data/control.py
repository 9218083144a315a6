"""Control spellings in the texts of examples: told once a file, and removed where that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vlm.data.examples import Example
from vlm.text import control


def without_control(examples: Sequence[Example], setting: str, *, strip: bool) -> list[Example]:
    """The examples, with control spellings removed from their texts if `strip`, and told once per file in any case.

    Args:
        setting: what removes them, for the message: `--strip-control`.
    """
    counts: dict[str, control.Count] = {}
    made = []
    for example in examples:
        prompt = control.find(example.prefix)
        target = [] if example.suffix is None else control.find(example.suffix, prompt=False)
        counts.setdefault(example.file, control.Count()).add(dict.fromkeys([*prompt, *target]), example.line)
        if strip and (prompt or target):
            suffix = example.suffix if example.suffix is None else control.strip_control(example.suffix, prompt=False)
            example = replace(example, prefix=control.strip_control(example.prefix), suffix=suffix)
        made.append(example)
    for file, count in counts.items():
        count.tell(file or "examples in memory", setting, stripped=strip)
    return made
