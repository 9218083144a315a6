"""The caption tokenizer of the official COCO scorer, without Java.

`tokenize` gives what pycocoevalcap 1.2 gives for one caption: the Java PTBTokenizer 3.4.1 with `-preserveLines
-lowerCase`, then the scorer's list of punctuation removed. `tokens` gives the Java tool's own output.

Two differences are deliberate. The official scorer writes all captions of a run into one file, where a caption can
change its neighbour and a line separator inside one shifts all that follow; here each caption is alone. And such a
separator (carriage return, vertical tab, form feed, U+2028, U+2029) counts as a blank, as a newline does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache, lru_cache

from vlm.eval.metrics import ptb_rules, ptb_words
from vlm.eval.metrics.ptb_rules import Emit

VERSION = "ptb-2"

# Brackets, written upper-case in the official list, are never dropped: they are lower-cased before the list is applied.
_DROPPED = frozenset({"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"})
# What the rules see after a caption: the golden values were made with a second line "zz", and every real file goes on.
_NEXT_LINE = "\nzz"
_LINE_SEPARATORS = dict.fromkeys(map(ord, "\n\r\v\f\u2028\u2029"), " ")
_IDEOGRAPHS = "\u3005-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f"  # kana too: each is a word
_BETWEEN_LETTERS = "-_.'\u00ad\u058a\u2010-\u2015\u2027\u203f"
_LOOKALIKES = frozenset(ptb_rules.LOOKALIKES)
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
    alike = not _LOOKALIKES.isdisjoint(text)
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
            at, emitted = _longest(text, at, alike)
            found += emitted
    return [_lower(token) for token in found]


def one_line(text: str) -> str:
    """The text with every line separator made a blank."""
    return text.translate(_LINE_SEPARATORS)


def _longest(text: str, at: int, alike: bool) -> tuple[int, list[str]]:
    """Where the token at `at` ends, and what it becomes; a character that no rule knows becomes nothing."""
    longest, end = at, at + 1
    emit: Emit | None = None
    for pattern, candidate, has_group in _rules_for(text[at], alike):
        match = pattern.match(text, at)
        if match and match.end() > longest:
            longest, end, emit = match.end(), match.end(1) if has_group else match.end(), candidate
    return end, emit(text[at:end]) if emit else []


def _lower(token: str) -> str:
    if token.isascii():
        return token.lower()
    token = token.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if "Σ" not in token:
        return token.lower()
    sigmas = {at: sigma for word in _words().finditer(token) for at, sigma in _sigmas(word)}
    return "".join(sigmas.get(at, "σ") if char == "Σ" else char.lower() for at, char in enumerate(token))


def _sigmas(word: re.Match[str]) -> Iterator[tuple[int, str]]:
    """Where the capital sigmas of a word stand, and what each becomes: "ς" after the last cased letter but the first.

    Java looks at the whole word, where Python looks past some signs only: digits and letters without case count too.
    """
    cased = [at for at, char in enumerate(word.group(), word.start()) if char.lower() != char.upper()]
    for at in cased:
        if word.string[at] == "Σ":
            yield at, "ς" if cased[0] < at == cased[-1] else "σ"


@cache
def _words() -> re.Pattern[str]:
    """Java's words within a token: letters and digits, with single signs between two letters or two digits."""
    letter = f"(?:(?![{_IDEOGRAPHS}])[{ptb_rules.LETTER_CHARS}])"
    digit = f"[{ptb_rules.DIGIT_CHARS}\u00bc-\u00be\u2150-\u215e]"
    joined = rf"(?<=\w)[{_BETWEEN_LETTERS}](?={letter})(?<!\d.)|(?<=\d)[.,'](?={digit})"
    return re.compile(f"(?:{letter}|{digit}|\u200d|{joined})+")


def _surrogates(match: re.Match[str]) -> str:
    """A character beyond U+FFFF as the two that Java counts, which decides which match is the longest."""
    high, low = divmod(ord(match.group()) - 0x10000, 0x400)
    return chr(0xD800 + high) + chr(0xDC00 + low)


@lru_cache(maxsize=1 << 12)
def _rules_for(first: str, alike: bool = False) -> tuple[_Compiled, ...]:
    """The rules that can match at a character, in the order of the table."""
    if not first.isascii():
        starts = {"*", "a", "0", first}  # a letter or a digit of some script, or neither
    elif first.isalpha() or first == "&":  # "&eacute;" is a letter, too
        starts = {"*", "a", first}
    else:
        starts = {"*", "0" if first.isdigit() else first}
    return tuple(
        compiled
        for rule, compiled in zip(ptb_rules.RULES, _compiled(alike), strict=True)
        if not starts.isdisjoint(rule.starts)
    )


@cache
def _compiled(alike: bool = False) -> tuple[_Compiled, ...]:
    """Every rule; only with `alike` do words spelt out match their look-alikes, which takes longer."""
    written = (rule.pattern if alike else ptb_rules.plainly(rule.pattern) for rule in ptb_rules.RULES)
    patterns = (re.compile(pattern, ptb_rules.FLAGS) for pattern in written)
    return tuple(
        (pattern, rule.emit, pattern.groups > 0) for pattern, rule in zip(patterns, ptb_rules.RULES, strict=True)
    )
