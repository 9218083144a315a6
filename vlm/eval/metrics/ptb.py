"""The caption tokenizer of the official COCO scorer, without Java.

`tokenize` gives what pycocoevalcap 1.2 gives for one caption: the Java PTBTokenizer 3.4.1 with `-preserveLines
-lowerCase`, then the scorer's list of punctuation removed. `tokens` gives the Java tool's own output.

Two differences are deliberate. The official scorer writes all captions of a run into one file, where a caption can
change its neighbour and a line separator inside one shifts all that follow; here each caption is alone. And such a
separator (carriage return, vertical tab, form feed, U+2028, U+2029) counts as a blank, as a newline does.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache

from . import ptb_rules, ptb_words
from .ptb_rules import Emit

VERSION = "ptb-1"

# Brackets, written upper-case in the official list, are never dropped: they are lower-cased before the list is applied.
_DROPPED = frozenset({"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"})
# What the rules see after a caption: the golden values were made with a second line "zz", and every real file goes on.
_NEXT_LINE = "\nzz"
_LINE_SEPARATORS = dict.fromkeys(map(ord, "\n\r\v\f\u2028\u2029"), " ")
_INSIDE_WORD = dict.fromkeys(map(ord, "0123456789_-"), "\u00b7")
_BEYOND_16_BITS = re.compile("[\U00010000-\U0010ffff]")
# A word of ASCII letters before a blank, or before a comma and a blank, with all blanks that follow. No rule reaches
# over a blank from there, so it is a token unless it is one of the words that are split.
_ORDINARY = re.compile(f"([A-Za-z]+)(,?) [{ptb_rules.SPACES}]*")
_SPLIT = frozenset(first + second for first, second in ptb_words.ASSIMILATED)

_Compiled = tuple[re.Pattern[str], Emit, bool]  # the pattern, its emit, whether it has a group


@lru_cache(maxsize=1 << 18)  # BLEU, ROUGE-L and CIDEr each ask for the same captions
def tokenize(text: str) -> str:
    """One caption to its tokens joined by one blank: "A dog's ball, isn't it?" -> "a dog 's ball is n't it"."""
    line = " ".join(tokens(text)).rstrip()
    return " ".join(token for token in line.split(" ") if token not in _DROPPED)


def tokens(text: str, *, shortcut: bool = True) -> list[str]:
    """The tokens of one caption, punctuation and all, as the Java tool prints them.

    Args:
        text: the caption.
        shortcut: take ordinary words without trying every rule; the result is the same without, only slower.
    """
    if not text.isascii():
        text = _BEYOND_16_BITS.sub(_surrogates, text)
    text = one_line(text)
    end = len(text)
    text += _NEXT_LINE
    found: list[str] = []
    at = 0
    while at < end:
        word = _ORDINARY.match(text, at) if shortcut else None
        if word and word[1].lower() not in _SPLIT:
            found += [word[1], ","] if word[2] else [word[1]]
            at = word.end()
        else:
            at, emitted = _longest(text, at)
            found += emitted
    return [_lower(token) for token in found]


def one_line(text: str) -> str:
    """The text with every line separator made a blank."""
    return text.translate(_LINE_SEPARATORS)


def _longest(text: str, at: int) -> tuple[int, list[str]]:
    """Where the token at `at` ends, and what it becomes; a character that no rule knows becomes nothing."""
    longest, end = at, at + 1
    emit: Emit | None = None
    for pattern, candidate, has_group in _rules_for(text[at]):
        match = pattern.match(text, at)
        if match and match.end() > longest:
            longest, end, emit = match.end(), match.end(1) if has_group else match.end(), candidate
    return end, emit(text[at:end]) if emit else []


def _lower(token: str) -> str:
    if token.isascii():
        return token.lower()
    token = token.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if "Σ" not in token or "İ" in token:
        return token.lower()
    # Java takes digits, underscores and hyphens for parts of the word when it asks whether a sigma is the last letter;
    # Python would not, so they are hidden behind a character that both look through.
    lowered = token.translate(_INSIDE_WORD).lower()
    return "".join(char if ord(char) in _INSIDE_WORD else low for char, low in zip(token, lowered, strict=True))


def _surrogates(match: re.Match[str]) -> str:
    """A character beyond U+FFFF as the two that Java counts, which decides which match is the longest."""
    high, low = divmod(ord(match.group()) - 0x10000, 0x400)
    return chr(0xD800 + high) + chr(0xDC00 + low)


@lru_cache(maxsize=1 << 12)
def _rules_for(first: str) -> tuple[_Compiled, ...]:
    """The rules that can match at a character, in the order of the table."""
    if not first.isascii():
        starts = {"*", "a", "0", first}  # a letter or a digit of some script, or neither
    elif first.isalpha() or first == "&":  # "&eacute;" is a letter, too
        starts = {"*", "a", first}
    else:
        starts = {"*", "0" if first.isdigit() else first}
    return tuple(
        compiled
        for rule, compiled in zip(ptb_rules.RULES, _compiled(), strict=True)
        if not starts.isdisjoint(rule.starts)
    )


@cache
def _compiled() -> tuple[_Compiled, ...]:
    patterns = (re.compile(rule.pattern, ptb_rules.FLAGS) for rule in ptb_rules.RULES)
    return tuple(
        (pattern, rule.emit, pattern.groups > 0) for pattern, rule in zip(patterns, ptb_rules.RULES, strict=True)
    )
