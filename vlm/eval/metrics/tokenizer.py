"""A simple caption tokenizer in the manner of the Penn Treebank: lower case, clitics split, punctuation dropped.

It equals the official one (the Java PTBTokenizer of pycocoevalcap, followed by its punctuation list) on plain English
captions: words, hyphenated words, whole and decimal numbers, sentence punctuation, clitics. It does not reproduce the
official treatment of URLs, e-mail addresses, emoticons, markup, dates, fractions with a blank, phone numbers, brackets,
currency signs or most abbreviations. `VERSION` is part of the name of every rule that depends on it.
"""

from __future__ import annotations

import re
from functools import lru_cache

VERSION = "simple-1"

# Titles and street words keep their dot wherever they stand; a longer list belongs to the exact tokenizer.
_ABBREVIATION = r"(?:mr|mrs|ms|dr|st|ave|mt|ft|vs|etc|jr|sr|inc|co|corp|ltd)\."
_WORD = r"[^\W_]+(?:[-_][^\W_]+)*"
_EITHER = r"[a-z0-9]+(?:/[a-z0-9]+){1,2}(?![-/\w])"
_TOKEN = re.compile(
    rf"""
      (?P<number>\d+(?:[.,:/]\d+)+(?![^\W_]))   # 1,000  3.5  10:30  3/4
    | (?P<cannot>\bcan(?=not\b))                # can|not
    | (?P<clock>o['’]clock\b)
    | (?P<short>\b{_ABBREVIATION})
    | (?P<initials>\b(?:[^\W\d_]\.){{2,}})      # u.s.  a.m.
    | (?P<letter>\b[a-z]\.(?!\w))              # plan b.
    | (?P<either>{_EITHER})                    # his/her
    | (?P<word>{_WORD}(?:['’](?:s|m|d|re|ve|ll|t)(?![^\W_]))?)
    | (?P<dots>\.{{2,}})
    | (?P<mark>[^\s\w]|_)
    """,
    re.VERBOSE,
)
_NEGATION = re.compile(r"(.*[^n])(n['’]t)", re.DOTALL)
_CLITIC = re.compile(r"(.+?)(['’](?:s|m|d|re|ve|ll))", re.DOTALL)
# pycocoevalcap's list, less its upper-case bracket names, which never occur in lower-cased text.
_DROPPED = frozenset(
    {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"', "’", "‘", "“", "”", "…"}
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


@lru_cache(maxsize=1 << 18)  # BLEU, ROUGE-L and CIDEr each ask for the same captions
def tokenize(text: str) -> str:
    """One caption to its tokens joined by one blank: "A dog's ball, isn't it?" -> "a dog 's ball is n't it"."""
    tokens: list[str] = []
    for match in _TOKEN.finditer(text.lower()):
        tokens += _split_clitics(match.group()) if match.lastgroup == "word" else [match.group()]
    kept = (_BRACKETS.get(token, token) for token in tokens if token not in _DROPPED and set(token) != {"."})
    return " ".join(kept).replace("’", "'")


def _split_clitics(word: str) -> list[str]:
    """ "isn't" -> is n't, "dog's" -> dog 's; a word without a clitic stays whole."""
    found = _NEGATION.fullmatch(word) or _CLITIC.fullmatch(word)
    return list(found.groups()) if found else [word]
