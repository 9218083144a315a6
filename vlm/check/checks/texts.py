"""Special tokens in a user's text are text: control ids come from the prompt format only, by id."""

from __future__ import annotations

import unicodedata

from vlm.check.report import Finding
from vlm.check.subject import Check, Subject
from vlm.errors import DataError
from vlm.text import control as control_text
from vlm.text.tokens import CONTROL_NAMES

FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
"""ASCII to its full-width twins, which some sentencepiece normalisers turn back."""
NAMES = ("<image>", "<bos>", "<eos>", "<pad>")
"""Tried whatever the tokenizer says its special tokens are."""


def special(subject: Subject) -> Finding:
    """Every control token of the tokenizer, typed in several ways, in a prefix and in a suffix."""
    control = control_ids(subject)
    leaked: list[str] = []
    lost: list[str] = []
    typed = [text for name in control for text in spellings(name)]
    refused = 0
    for text in typed:
        try:
            with control_text.meant():
                regions = _user_regions(subject, text)
        except DataError:
            refused += 1  # a refusal is loud
            continue
        if set(control.values()).intersection(index for region in regions for index in region):
            leaked.append(text)
        elif not all(_says(subject, region, text) for region in regions):
            lost.append(text)
    problems = [
        f"{what}: {', '.join(map(repr, texts[:4]))}"
        for what, texts in (("a control id from", leaked), ("text lost of", lost))
        if texts
    ]
    detail = f"of {len(typed)} texts with special tokens became control ids or lost characters"
    if refused:
        detail += f"; {refused} refused"
    return Finding(measured=len(leaked) + len(lost), limit=0, detail=detail, problem="; ".join(problems))


def control_ids(subject: Subject) -> dict[str, int]:
    """Control tokens by name: all that the tokenizer marks special and all that are named like Gemma's."""
    tokenizer = subject.processor.tokenizer
    special_tokens = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    named = {token: index for token, index in added.items() if CONTROL_NAMES.fullmatch(token)}
    vocabulary = tokenizer.get_vocab()
    known = {name: vocabulary[name] for name in NAMES if name in vocabulary}
    found = {**special_tokens, **named, **known}
    # A Gemma vocabulary has dozens of <unusedN>, all treated alike.
    unused = sorted(name for name in found if name.startswith("<unused"))[2:]
    return {name: index for name, index in found.items() if name not in unused}


def spellings(name: str) -> list[str]:
    """Ways to type a special token."""
    brackets = name.translate({code: FULL_WIDTH[code] for code in map(ord, "<>")})
    return [
        name,
        f"a {name} b",
        f"a{name}b",
        f"{name}{name}",
        f"{name[0]}{name}{name[1:]}",
        brackets,
        f"a {name.translate(FULL_WIDTH)} b",
    ]


def _user_regions(subject: Subject, text: str) -> list[list[int]]:
    """Ids of a text as prefix (between BOS and newline) and as suffix (up to EOS)."""
    batch = subject.processor(text=[text], suffix=[text])
    ids, types = batch.input_ids[0].tolist(), batch.token_type_ids[0].tolist()
    boundary = types.index(1) if 1 in types else len(types)
    return [ids[1 : boundary - 1], ids[boundary:-1]]


def _says(subject: Subject, ids: list[int], text: str) -> bool:
    said = subject.processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return _plain(said) == _plain(text)


def _plain(text: str) -> str:
    """Without what a tokenizer may legally normalise: full width, blanks."""
    return "".join(unicodedata.normalize("NFKC", text).split())


CHECKS = (Check("special-text", "special tokens typed by a user stay text", special, 140, runs_tower=False),)
