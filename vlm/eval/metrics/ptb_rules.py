"""The rules of the official caption tokenizer, as data; `ptb` applies them.

At every position all rules are tried and the longest match wins, counting the text that a rule only looks ahead at;
of equally long matches the first rule of the table wins. So a rule is a regular expression whose whole match decides,
while the token is its group 1 (or the whole match if it has no group).

Written from a description of the tokenizer's behaviour and from its answers to strings of our own
(`tests/data/ptb/README.md`), not from its source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlm.eval.metrics import ptb_chars, ptb_words

Emit = Callable[[str], list[str]]

# --- Characters -----------------------------------------------------------------------------------------------------


def _ranges(spec: str) -> str:
    """Ranges of hexadecimal code points -> the inside of a character class."""
    ends = (part.partition("-") for part in spec.split())
    return "".join(f"\\u{int(low, 16):04x}" + (f"-\\u{int(high, 16):04x}" if high else "") for low, _, high in ends)


SOFT_HYPHEN = "\u00ad"
_LETTER_CHARS = _ranges(ptb_chars.LETTERS)
_MARK_CHARS = _ranges(ptb_chars.MARKS)
_DIGIT_CHARS = "0-9" + _ranges(ptb_chars.DIGITS)
LETTER_CHARS = f"A-Za-z{_LETTER_CHARS}{_MARK_CHARS}"
DIGIT_CHARS = _DIGIT_CHARS
SPACES = " \\t\\u00a0\\u2000-\\u200a\\u3000"

_LETTER = f"[A-Za-z{_LETTER_CHARS}]"
_ENTITY = r"&[aeiou](?:acute|grave|uml);"
_D = f"[{_DIGIT_CHARS}]"
_L = f"(?:[A-Za-z{SOFT_HYPHEN}{_LETTER_CHARS}{_MARK_CHARS}]|{_ENTITY})"
_LD = f"(?:[A-Za-z{SOFT_HYPHEN}{_LETTER_CHARS}{_MARK_CHARS}{_DIGIT_CHARS}]|{_ENTITY})"
_ALNUM = f"A-Za-z{_LETTER_CHARS}{_DIGIT_CHARS}"
_A = f"[{_ALNUM}]"
_SP = f"[{SPACES}]"
_GAP = f"[{SPACES}\n\x85]"  # what rules look ahead for; a \x85 that is reached is an ellipsis


LOOKALIKES = "\u017f\u212a\u0131\u0130"  # a long s, the Kelvin sign, Turkish i without and with a dot
_WITH_LOOKALIKES, _PLAINLY = "(?u:", "(?:"


def _spelt(pattern: str) -> str:
    """A word spelt out: "\u017f", "\u212a", "\u0131", "\u0130" are also its s, k and i. Letter ranges are not."""
    return f"{_WITH_LOOKALIKES}{pattern})"


def plainly(pattern: str) -> str:
    """The pattern for text without LOOKALIKES."""
    return pattern.replace(_WITH_LOOKALIKES, _PLAINLY)


_APOS = rf"(?:['\x92\u2019]|{_spelt('&apos;')})"
_APOS_LOOSE = rf"(?:['`\x91\x92\u2018\u2019\u201b]|{_spelt('&apos;')})"
_CAPITAL = f"(?-i:[A-Z{_ranges(ptb_chars.CAPITALS)}])"

# --- What a match becomes -------------------------------------------------------------------------------------------


def _same(text: str) -> list[str]:
    return [text]


def _nothing(text: str) -> list[str]:
    return []


def _word(text: str) -> list[str]:
    return [text.replace(SOFT_HYPHEN, "") or "-"] if SOFT_HYPHEN in text else [text]  # one alone is a hyphen


def _ends_sentence(text: str) -> list[str]:
    return [*_word(text), "."]


def _always(token: str) -> Emit:
    return lambda text: [token]


def _brackets(text: str) -> list[str]:
    return [text.replace("(", "-lrb-").replace(")", "-rrb-")]


def _no_break(text: str) -> list[str]:
    """One token in spite of its blanks, which become no-break spaces."""
    return [text.replace(" ", "\u00a0")]


def _no_break_brackets(text: str) -> list[str]:
    return _brackets(text.replace(" ", "\u00a0"))


def _ampersand(text: str) -> list[str]:
    return _word(re.sub("&amp;", "&", text, flags=re.IGNORECASE))


def _plain_apostrophe(text: str) -> list[str]:
    return _quotes(text.replace("&apos;", "'"))


_QUOTES = {
    "\u2018": "`", "\u2019": "'", "\u201b": "`", "\u2039": "`", "\u203a": "'", "\x91": "`", "\x92": "'",
    "\u201c": "``", "\u201d": "''", "\xab": "``", "\xbb": "''", "\x93": "``", "\x94": "''",
}  # fmt: skip


def _quotes(text: str) -> list[str]:
    return ["".join(_QUOTES.get(char, char) for char in text)]


# --- The table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One kind of token."""

    name: str
    starts: str
    """Characters that a match can begin with; `a` stands for every letter, `0` for every digit, `*` for anything."""
    pattern: str
    """Regular expression, compiled with FLAGS. Its whole match competes; group 1 (if there is one) is the token."""
    emit: Emit
    """The text of the token, as written -> the tokens that come out, not yet lower-cased."""


FLAGS = re.IGNORECASE | re.ASCII  # ASCII: only ASCII letters fold their case, but where `_spelt` says otherwise
_TABLE: list[Rule] = []


def _rule(name: str, starts: str, pattern: str, emit: Emit = _word) -> None:
    _TABLE.append(Rule(name, starts, pattern, emit))


def _any_of(words: Sequence[str], apostrophe: str = "'") -> str:
    longest_first = sorted(words, key=len, reverse=True)
    return _spelt("|".join(re.escape(word).replace("'", apostrophe) for word in longest_first))


_rule("blanks", " \t\u00a0\u3000" + "".join(map(chr, range(0x2000, 0x200B))), f"{_SP}+", _nothing)

# Markup. A tag is one token, with its blanks, if its attributes look plausible.
_NAME = r"[a-z][a-z0-9_:.-]*"
_ATTRIBUTE = rf" +{_NAME}(?: *= *(?:'[^']*'|\"[^\"]*\"))?"
_TAG = rf"<(?:/{_NAME} *|{_NAME}(?:{_ATTRIBUTE})* */? *|[!?][a-z-][^>]*)>"
_rule("tag", "<", _TAG, _no_break)
_rule("<_>", "<", "<_>", _same)
_rule("dash entity", "&", _spelt("&(?:MD|mdash|ndash);"), _always("--"))
_rule("&amp;", "&", "&amp;", _always("&"))
_rule("&lt;", "&", "&lt;", _always("<"))
_rule("&gt;", "&", "&gt;", _always(">"))
_rule("&nbsp;", "&", _spelt("&nbsp;"), _nothing)
_rule("entity kept", "&", "&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);", _same)

# Addresses.
_MAIL = r"[^ \t\n\r\f\"<>|(){}\u00a0]"
_MAIL_PART = r"[^ \t\n\r\f\"<>|(){}\u00a0.]"
_rule("mail", "a0<&", rf"(?:<|&lt;)?[a-z0-9]{_MAIL}*@(?:{_MAIL_PART}+\.)*{_MAIL_PART}+(?:>|&gt;)?", _same)

# Abbreviations. Company words and the like also end the sentence before a capital, a tag or a second blank; dotted
# letters only before certain words.
_ENDS = rf"{_GAP}(?:{_CAPITAL}|{_TAG}|{_GAP})"
_STARTS = _spelt("|".join(f"(?-i:{w[0]}){re.escape(w[1:])}" for w in ptb_words.SENTENCE_STARTS))
_ACRONYM = r"[a-z]\.(?:[a-z]\.)+"
_CAPITAL_ABBR = _spelt("|".join(f"(?-i:{w[0].upper()}){w[1:]}" for w in ptb_words.MAY_END_SENTENCE_CAPITAL))
_PTY = "(?-i:[Pp]?[Pp][Tt][ey][sSſ]?)"
_ENDING = rf"(?:{_any_of(ptb_words.MAY_END_SENTENCE)}|{_CAPITAL_ABBR}|{_PTY}|(?:Ph|Ed)\.D)\."
_NEXT_SENTENCE = rf"{_GAP}+(?:{_STARTS}|{_TAG}){_GAP}"
_rule("Co. Ltd", "a", rf"((?:co|pt[ey])\.){_SP}{_spelt('Ltd|Lim')}", _same)
_rule("abbreviation ends", "a", rf"({_ENDING}){_ENDS}", _ends_sentence)
# Whatever follows counts as looked at, so "co.w" is "co." and "w", though words joined by a dot are one token.
_NO_LETTER = f"[^{_ALNUM}{SOFT_HYPHEN}{_MARK_CHARS}]"
_rule("abbreviation", "a", rf"({_ENDING})(?s:{_NO_LETTER}.|.{_NO_LETTER}|.)", _same)
_rule("title", "a", rf"(?:{_any_of(ptb_words.KEEPS_DOT)}|cont'd|(?-i:[Mm][ft])g)\.", _same)
_rule("number word", "a", rf"({_any_of(ptb_words.DOT_BEFORE_NUMBER)}\.){_GAP}?{_D}", _same)
_rule("acronym ends", "a", rf"({_ACRONYM}|{_spelt('non-U[.]S[.]|U[.]S[.]-U[.]K[.]')}){_NEXT_SENTENCE}", _ends_sentence)
_rule("acronym without its last dot", "a", rf"({_spelt('non-U[.]S|U[.]S[.]-U[.]K')}){_GAP}", _same)
_rule("acronym", "a", _ACRONYM, _same)
_rule("letter ends", "a", rf"([a-z])\.{_NEXT_SENTENCE}", _same)
_rule("letter.", "a", r"[a-z]\.", _same)

# Words. Apostrophes are many: straight, curly, as an entity, and for some rules also the opening ones.
_WORD = f"{_L}{_LD}*(?:[.!?]{_L}{_LD}*)*"
_NAME_APOS = f"[dlo]{_APOS_LOOSE}{_A}{{2,}}"
_PART = f"(?:{_NAME_APOS}|{_A}+)"
_THING = rf"{_PART}(?:[-_\u058a\u2010\u2011]{_PART})*"
_HYPHENED = rf"[a-z0-9][a-z0-9.,{SOFT_HYPHEN}]*(?:-(?:[a-z]\.(?:[a-z]\.)+|[a-z0-9{SOFT_HYPHEN}]+))+"
# The entity first: "S&AMP;L" is one token, and "S&AMP" is no longest match of it.
_AND = "(?:&amp;|&)"
_CAPITALS_JOINED = rf"(?-i:[A-Z]+)(?:(?:{_AND}|\+)(?-i:[A-Z]+))+"
for _first, _second in ptb_words.ASSIMILATED:
    _rule("assimilated", "a", _spelt(f"({_first}){_second}"))
_rule("'t is", "'", _spelt("('t)is"), _same)
_rule("'t was", "'", _spelt("('t)was"), _same)
_rule("apostrophe inside", "a", _any_of(ptb_words.APOSTROPHE_INSIDE, _APOS), _same)
_rule("o'o", "a", f"o{_APOS_LOOSE}o", _same)
_rule("before clitic", "a", f"({_WORD}){_APOS}(?:[msd]|re|ve|ll)")
_rule("vowel'vowel", "a", f"{_LETTER}+[aeiouy]{_APOS_LOOSE}(?-i:[aeiouA-Z]){_LETTER}*")
_rule("apostrophe first", "'\x92\u2019&", _any_of(ptb_words.APOSTROPHE_FIRST, _APOS), _same)
_rule("apostrophe last", "a", _any_of(ptb_words.APOSTROPHE_LAST, _APOS), _same)
_rule("decade", "'\x92\u2019&", f"{_APOS}[2-9]0{_spelt('s')}", _same)
_rule("year", "'\x92\u2019&", rf"({_APOS}[0-9]{{2}}){_GAP}", _same)
_rule("not", "a", f"n{_APOS_LOOSE}t", _plain_apostrophe)
_rule("before not", "a", f"([a-z{SOFT_HYPHEN}]*[a-mo-z]{SOFT_HYPHEN}*)n{_APOS_LOOSE}t")
_rule("clitic", "'\x92\u2019&", f"({_APOS}(?:[msd]|re|ve|ll))[^a-z]", _plain_apostrophe)
_rule("bare clitic", "\x92\u2019&", "(?:[\x92\u2019]|&apos;)(?:[msd]|re|ve|ll)", _plain_apostrophe)
_rule("d' j' l'", "a", f"[djl]{_APOS}", _same)
_rule("y'", "a", f"(y{_APOS}){_LETTER}", _same)
_rule("X'xx", "a", f"(?-i:[A-HJ-XZn]){_APOS_LOOSE}{_LETTER}{{2,}}")
_rule("prefix-", "a", _spelt("(?:pro|anti)-"))
_rule("word", "a", _WORD)
_rule("thing", "a0", _THING)
_rule("hyphened", "a0", _HYPHENED)
# A rule for each kind of word: the first kind that fits need not be the longest.
for _joined in (_WORD, _THING, _HYPHENED, _CAPITALS_JOINED):
    _rule("word.,", "a0", rf"({_joined}\.)[,;:\u3001]", _ampersand)
_rule("S&P-500", "a", _spelt(f"S{_AND}P-500"), _ampersand)
_rule("S&Ls", "a", _spelt(f"S{_AND}Ls"), _ampersand)
_rule("C++", "a", r"c\+\+|[cf]#", _same)
_rule("A&B", "a", _CAPITALS_JOINED, _ampersand)
_rule("a/b", "a0", r"[a-z0-9]+(?:-[a-z]+){0,2}(?:\\?/[a-z0-9]+(?:-[a-z]+){0,2}){1,2}", _same)
_rule("US$", "a", r"(?-i:[A-Z]+)\$", _same)

# Web addresses, tags and file names.
_URL = r"[^ \t\n\r\f\"<>|(){}]"
_URL_END = r"[^ \t\n\r\f\"<>|(){}.!?,-]"
_rule("http", "a", rf"{_spelt('https?')}://{_URL}+{_URL_END}", _same)
_PATH = rf"[^ \t\n\r\f\"<>|()]+{_URL_END}"
_HOST = r"[^ \t\n\r\f\"<>|(){}.!?,]"
_WWW = rf"www\.(?:{_HOST}+\.)+[a-z]{{2,4}}"
# Two rules: the longest host is not always the host of the longest match.
_rule("www with a path", "a", f"{_WWW}/{_PATH}", _same)
_rule("www", "a", _WWW, _same)
_BARE = r"[^ \t\n\r\f\"'`<>|(){}.!?$,-_]"
_rule("bare host", "*", rf"(?-i:(?:{_BARE}+\.)+)(?:com|net|org|edu)(?:/{_PATH})?", _same)
_rule("@name", "@", "@[a-z_][a-z_0-9]*", _same)
_rule("#tag", "#", f"#{_L}+", _same)
_STEM = f"{_LD}+"
_FILE = rf"{_STEM}(?:\.{_STEM})*\.{_any_of(ptb_words.FILE_ENDINGS)}"
_rule("file", "a0", rf"({_FILE})(?:{_GAP}|[.?!,])", _same)

# Numbers.
_SLASH = r"(?:\\?/|\u2044)"
_DIGITS = f"(?:{SOFT_HYPHEN}?{_D})+"
_GROUP = f"[.:,\u066b\u066c]{_D}(?:{SOFT_HYPHEN}?{_D})*"
_rule("number", "0+-.:,\u066b\u066c", rf"[-+]?(?:{_DIGITS}(?:{_GROUP})*|(?:{_GROUP})+)")
_rule("date", "0", f"{_D}{{1,2}}[-/]{_D}{{1,2}}[-/]{_D}{{2,4}}", _same)
_rule("fraction", "0", f"(?:{_D}{{1,4}}[- \u00a0])?{_D}{{1,4}}{_SLASH}{_D}{{1,4}}", _no_break_brackets)
_PHONE = "[0-9]{3,4}[- \u00a0]?[0-9]{3,5}"
_AREA = "\\([0-9]{2,3}\\)[ \u00a0]?|\\+*[0-9]{2,4}[- \u00a0](?:[0-9]{2,4}[- \u00a0])?"
_rule("phone", "0+(", f"(?:{_AREA}){_PHONE}", _no_break_brackets)
for _char, _text in (("\u00bd", "1/2"), ("\u00bc", "1/4"), ("\u00be", "3/4"), ("\u2153", "1/3"), ("\u2154", "2/3")):
    _rule("fraction sign", _char, _char, _always(_text))
for _run in (
    "\u00b2\u00b3\u00b9\u2070\u2074\u2075\u2076\u2077\u2078\u2079",
    "\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089",
):
    _rule("superscripts or subscripts", _run, f"[{_run}]+", _same)

# Quotes and other marks.
_rule("``", '"&', '("|(?-i:&quot;))[a-z0-9$]', _always("``"))
_rule("''", '"&', '"|(?-i:&quot;)', _always("''"))
_rule("`", "'&", "(')[a-z][^ \t\n\r\u00a0]", _always("`"))
_rule("'", "'&", "'|(?-i:&apos;)", _always("'"))
_rule("&QUOT;", "&", _spelt("&(?:quot|apos);"), _same)
_rule("double quote", "'`", "''|``", _same)
_CURLY = "`\x91\x92\x93\x94\xab\xbb\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u2039\u203a"
_rule("curly quotes", _CURLY, f"[{_CURLY}]{{1,2}}", _quotes)
_rule("smiley", "<>:;=", r"(?-i:([<>]?[:;=][-o'*]?[]()DdPpO@{|\\[])[^a-zA-Z0-9])", _brackets)
_FACE = r"[-x=~<>'^]"
_rule("face", "x-=~<>'^", f"(?-i:{_FACE}_{_FACE})", _same)
_rule("(face)", "(", rf"(?-i:\((?:{_FACE}[_.]?{_FACE}|[x=~<>'^]-[`x=~<>'^])\))", _brackets)
_rule("dash", "-", "---?-?", _always("--"))
_rule("long dash", "-", "-{5,}", _same)
_rule("dash sign", "\x96\x97\u2013\u2014\u2015", "[\x96\x97\u2013\u2014\u2015]", _always("--"))
_rule("dots", ".", r"\.{3,5}|\.(?:[ \u00a0]\.){2,4}", _always("..."))
_rule("ellipsis", "\x85\u2026", "[\x85\u2026]", _always("..."))
_rule("?!", "?!", "[?!]+", _same)
_rule("runs", "_@#*\\", r"_+|@+|\#+|\*+|(?:\\\*)+", _same)
_rule("<<", "<>", "<<|>>", _same)
_rule("escaped bracket", "-", _spelt("-[LR](?:R|S|C)B-"), _same)
for _char, _text in {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}.items():
    _rule("bracket", _char, re.escape(_char), _always(_text))
for _char, _text in {"\u00a3": "#", "\u00a2": "cents"}.items():
    _rule("currency", _char, _char, _always(_text))
_rule("currency", "\x80\xa4\u20a0\u20ac", "[\x80\xa4\u20a0\u20ac]", _always("$"))
_rule("sign", "*", rf"[-!#$%&*+,./:;<=>?@\\^_`|~{_ranges(ptb_chars.SYMBOLS)}]", _same)

RULES: tuple[Rule, ...] = tuple(_TABLE)
