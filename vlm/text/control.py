"""Control spellings in users' texts: `<image>`, `<bos>`, `[INST]`, a newline at the end of a prompt, and their kind.

What a prompt says is text. transformers asks people to write `<image>caption en`, chat models want their markers; here
the processor puts images, BOS, newline and EOS in their places, and a spelling that was typed reaches the model as the
pieces of its characters, which changes the answer. So it is told, once per file or run, and a setting removes it.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vlm.text import locations
from vlm.text.tokens import GEMMA_NAMES
from vlm.words import more

logger = logging.getLogger(__name__)

NEWLINE = "a newline at the end"
TOLD = 5
"""So many spellings are told, and how many more there are."""
LOCATIONS = "malformed <loc> or <seg> tokens"
_MARKS = (
    r"(?:<\|im_start\|>|<start_of_turn>)(?:user|assistant|system|model)\b"
    r"|<\|start_header_id\|>\w+<\|end_header_id\|>"
    rf"|<(?:{GEMMA_NAMES}|/?s|img|video|audio|image_?\d+|image_\w+|im_\w+|/?image|vision_\w+)>"
    r"|<\|[^|<>\n]{1,40}\|>|\[/?(?:INST|SYS|IMG|CLS|SEP|PAD)\]|<</?SYS>>"
)
_ROLES = (
    r"(?m:^)(?:USER|ASSISTANT|SYSTEM|Human|Assistant|\#\#\#\ ?(?:Human|Assistant|Instruction|Response)):"
    r"|(?<=\s)(?:ASSISTANT|\#\#\#\ ?(?:Assistant|Response)|Assistant):(?=\s*\Z)"
)
_IN_TARGETS = re.compile(_MARKS)
_IN_PROMPTS = re.compile(f"{_MARKS}|{_ROLES}")
_told: set[str] = set()
"""Spellings that this process has spoken of already."""


def find(text: str, *, prompt: bool = True) -> list[str]:
    """The control spellings in a text, each once; in a prompt also roles (`USER:`) and a newline at its end."""
    if not ("<" in text or "[" in text or (prompt and (":" in text or text[-1:].isspace()))):
        return []
    found = [match[0] for match in (_IN_PROMPTS if prompt else _IN_TARGETS).finditer(text)]
    if prompt and _ends_in_newline(text):
        found.append(NEWLINE)
    return list(dict.fromkeys(found))


def strip_control(text: str, *, prompt: bool = True) -> str:
    """The text without control spellings and the blanks around them: "<image>caption en\\n" -> "caption en".

    Inside a text one blank (or newline) stays where there was one. A text without such a spelling stays as it is.
    """
    marks = _IN_PROMPTS if prompt else _IN_TARGETS
    while find(text, prompt=prompt):  # what was around a spelling may be one itself
        kept, end = "", 0
        for match in marks.finditer(text):
            kept = _join(kept, text[end : match.start()])
            end = match.end()
        text = _join(kept, text[end:]).strip() if end else text
        if prompt and _ends_in_newline(text):
            text = text.rstrip()
    return text


def _join(before: str, after: str) -> str:
    """Two texts that a spelling stood between: of the blanks around it one stays, a newline before a blank."""
    left, right = before.rstrip(), after.lstrip()
    blanks = before[len(left) :] + after[: len(after) - len(right)]
    return left + ("\n" if "\n" in blanks else blanks[:1]) + right if left and right else left or right


def _ends_in_newline(text: str) -> bool:
    tail = text[len(text.rstrip()) :]
    return "\n" in tail or "\r" in tail


@dataclass
class Count:
    """Which spellings some texts hold: how many texts each, and the line of the first."""

    texts: int = 0
    found: dict[str, list[int]] = field(default_factory=dict)

    def add(self, spellings: Iterable[str], line: int) -> None:
        self.texts += 1
        for spelling in spellings:
            self.found.setdefault(spelling, [0, line])[0] += 1

    def tell(self, where: str, setting: str, *, stripped: bool) -> None:
        """Say once what was found in a file, and what removes it (or that it was removed)."""
        if not self.found:
            return
        _told.update(self.found)
        most = sorted(self.found.items(), key=lambda one: (-one[1][0], one[1][1], one[0] == NEWLINE))
        shown = [
            f"{_quoted(spelling)} in {count:,} of {self.texts:,} (first line {line})"
            for spelling, (count, line) in most[:TOLD]
        ] + ([more(len(most), TOLD)] if len(most) > TOLD else [])
        if stripped:
            logger.info("%s: removed as control text (%s): %s", where, setting, "; ".join(shown))
            return
        said = "; ".join(shown)
        logger.warning("%s: %s. %s", where, said, _meaning([spelling for spelling, _ in most], setting))


@contextmanager
def meant() -> Iterator[None]:
    """Around texts that hold control spellings on purpose (a check types them all): nothing is told of them."""
    before = set(_told)
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False
        _told.clear()
        _told.update(before)


SETTING = "strip_control=True (on the command line --strip-control)"


def checked(texts: Sequence[Any], *, prompt: bool = True, strip: bool = False) -> list[Any]:
    """The texts, stripped if asked for; else a spelling that this process has not spoken of yet is told, and (once)
    what is wrong with `<loc>` and `<seg>` tokens. What is no text stays what it is."""
    made = []
    for text in texts:
        if isinstance(text, str) and strip:
            text = strip_control(text, prompt=prompt)
        elif isinstance(text, str):
            new = [spelling for spelling in find(text, prompt=prompt) if spelling not in _told]
            if new:
                _told.update(new)
                what = "a prompt" if prompt else "a target"
                logger.warning("%s has %s. %s", what, ", ".join(map(_quoted, new)), _meaning(new, SETTING))
        if isinstance(text, str) and LOCATIONS not in _told and (wrong := locations.problems(text)):
            _told.add(LOCATIONS)
            logger.warning("%s has %s: %s", "a prompt" if prompt else "a target", LOCATIONS, wrong[0])
        made.append(text)
    return made


def _quoted(spelling: str) -> str:
    return spelling if spelling == NEWLINE else ascii(spelling)


def _meaning(spellings: list[str], setting: str) -> str:
    """What was probably meant, and what to do."""
    meant = []
    if any(re.search(r"im(age|g)|vision|IMG", spelling) for spelling in spellings):
        meant.append("images get their place from the processor")
    if any(re.search(r"bos|eos|pad|^</?s>$", spelling) for spelling in spellings):
        meant.append("BOS, EOS and padding are added by the processor")
    if NEWLINE in spellings:
        meant.append("every prompt is ended with a newline by the processor")
    if len(meant) < 1 or any(re.search(r"INST|SYS|\||:$|_turn|^\[", spelling) for spelling in spellings):
        meant.append("a PaliGemma prompt has no chat template")
    return f"To the model this is text like any other and changes the answer: {'; '.join(meant)}. {setting} removes it"
