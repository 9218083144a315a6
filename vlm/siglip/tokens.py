"""A tokenizer's own settings against its family's rule: what is used of it, and what is not.

Only a tokenizer's pieces are used here. Where its files say something else than the rule (padding on the left, a BOS,
another length), a program that believes them gets other embeddings than the towers were trained for; so each is named.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vlm.errors import CheckpointError, ConfigError
from vlm.siglip.rules import TextRule

UNSET = 1_000_000
"""transformers writes 10^30 for a length that nobody has set."""
SPARE = 128
"""Rows of an embedding table without a token, as a table that is rounded up has."""


class Specials(NamedTuple):
    """Token ids around a text: `bos` is empty in most families."""

    bos: list[int]
    eos: int
    pad: int


def specials(tokenizer: Any, rule: TextRule) -> Specials:
    """The ids that a rule means: those of its own spellings where the vocabulary has them, else what the tokenizer
    calls so.

    Raises:
        ConfigError: the tokenizer has no such token.
    """
    eos = _id(tokenizer, rule.eos, tokenizer.eos_token_id)
    pad = eos if rule.pad == rule.eos else _id(tokenizer, rule.pad, tokenizer.pad_token_id)
    bos = None if rule.bos is None else _id(tokenizer, rule.bos, tokenizer.bos_token_id)
    needed = {"end": eos, "padding": pad} | ({} if rule.bos is None else {"beginning": bos})
    absent = [name for name, value in needed.items() if value is None]
    if absent or eos is None or pad is None:
        raise ConfigError(
            f"the tokenizer has no {' and no '.join(absent)} token, which {rule.title} needs ({rule.tokens}); give the"
            f" tokenizer of the checkpoint"
        )
    return Specials([] if bos is None else [bos], eos, pad)


def _id(tokenizer: Any, spelling: str, otherwise: int | None) -> int | None:
    return tokenizer.convert_tokens_to_ids(spelling) if has_token(tokenizer, spelling) else otherwise


def has_token(tokenizer: Any, spelling: str) -> bool:
    """Whether the vocabulary has a token that is spelt so; an unknown one has the id of another."""
    found = tokenizer.convert_tokens_to_ids(spelling)
    return isinstance(found, int) and tokenizer.convert_ids_to_tokens(found) == spelling


def check_vocabulary(tokenizer: Any, vocabulary: int, released: bool, origin: str) -> None:
    """Refuse a tokenizer that is not the text tower's.

    Args:
        vocabulary: rows of the text tower's embedding table.
        released: the table has the size of a released vocabulary, which is never rounded up.

    Raises:
        CheckpointError: it has more pieces than the table has rows, or another number than a released vocabulary.
    """
    pieces = tokenizer.vocab_size
    if pieces > vocabulary or (released and pieces != vocabulary):
        raise CheckpointError(
            f"{origin}: the tokenizer has {pieces:,} pieces, the text tower knows {vocabulary:,}: it is not this"
            f" checkpoint's; every text would get a wrong embedding. Copy the checkpoint's own tokenizer files, or give"
            f" tokenizer="
        )


def contradictions(tokenizer: Any, rule: TextRule, context: int, vocabulary: int) -> list[str]:
    """What a tokenizer's files say against the rule, and what is used instead; empty where they agree.

    Args:
        context, vocabulary: rows of the text tower's position table and of its embedding table.

    Raises:
        ConfigError: as `specials`.
    """
    ids = specials(tokenizer, rule)
    spelt = tokenizer.convert_ids_to_tokens
    row = tokenizer("a")["input_ids"]
    longest = tokenizer.model_max_length
    own_pad = rule.pad == rule.eos
    seen = rule.attention == "both"  # where nothing sees the padding, neither it nor a mask over it matters
    found = [
        (tokenizer.padding_side != rule.side, f"padding_side is {tokenizer.padding_side}: padded on the {rule.side}"),
        (
            tokenizer.eos_token_id != ids.eos,
            f"eos_token is {tokenizer.eos_token!r}: a text ends with {spelt(ids.eos)!r} (id {ids.eos})",
        ),
        (
            seen and tokenizer.pad_token_id != ids.pad,
            f"pad_token is {tokenizer.pad_token!r}: padded with {spelt(ids.pad)!r} (id {ids.pad})"
            + (", the end token again" if own_pad else ""),
        ),
        (
            rule.bos is None and tokenizer.bos_token_id is not None and tokenizer.bos_token_id in row,
            f"puts {tokenizer.bos_token!r} before a text: left out",
        ),
        (rule.bos is not None and ids.bos != row[:1], f"puts no {rule.bos!r} before a text: put there"),
        (ids.eos not in row, f"ends a text without {spelt(ids.eos)!r}: put there"),
        (
            longest < UNSET and longest != context,
            f"model_max_length is {longest}: {context}, the rows of the position table",
        ),
        (
            seen and "attention_mask" in tokenizer.model_input_names,
            "model_input_names has attention_mask: no mask, the towers were trained without",
        ),
        (
            getattr(tokenizer, "do_lower_case", True) is False and rule.case == "lower",
            "do_lower_case is false: lower-cased",
        ),
        (
            len(tokenizer) > vocabulary,
            f"has {len(tokenizer):,} tokens, the text tower {vocabulary:,} rows: a text with a token beyond is refused",
        ),
        (
            len(tokenizer) < vocabulary - SPARE,
            f"has {len(tokenizer):,} tokens, the text tower {vocabulary:,} rows: the others are never read; look"
            " whether it is this checkpoint's",
        ),
    ]
    return [told for wrong, told in found if wrong]


def notes(tokenizer: Any, rule: TextRule) -> list[str]:
    """What the rule does to a text because the tokenizer alone does not, as plain transformers would have it."""

    def same(one: str, other: str) -> bool:
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (one, other)]
        return bool(ids[0] == ids[1])

    pairs = [
        ("A", "a", "does not lower-case by itself: done before"),
        ("a.b", "ab", "does not drop punctuation by itself: done before"),
    ]
    return [told for one, other, told in pairs if rule.clean(one) == rule.clean(other) and not same(one, other)]
