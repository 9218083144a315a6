"""PaliGemma's prompt format: `[image tokens] [BOS] prefix \\n  suffix [EOS]`.

Prefix, newline and suffix are tokenised separately and concatenated, so a boundary never moves with its neighbours.
Source: PaliGemma, section 3.2.1 (arXiv 2407.07726); big_vision `configs/proj/paligemma/transfers/common.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlm.errors import ConfigError, DataError
from vlm.text.tokenizer import TextEncoder, Tokenizer

CAPTION = "caption en"
"""Prompt for a caption in English."""


def answer(question: str) -> str:
    """Prompt for a visual question in English: `answer en {question}`."""
    return f"answer en {question}"


@dataclass(frozen=True)
class EncodedText:
    """One sample's text as ids.

    Attributes:
        prefix: BOS, prefix and newline.
        suffix: suffix and EOS, both supervised: EOS alone for an empty suffix; empty when generating. Without EOS when
            the suffix was cut.
        truncated: the suffix was cut to fit.
    """

    prefix: list[int]
    suffix: list[int]
    truncated: bool


class PromptEncoder:
    """Turns (prefix, suffix) pairs into ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(tokenizer, name) is None:
                raise ConfigError(f"the tokenizer has no {name}; PaliGemma's format needs bos, eos and pad tokens")
        self._encode = TextEncoder(tokenizer)
        self._bos: int = tokenizer.bos_token_id
        self._eos: int = tokenizer.eos_token_id
        self._newline = self._encode("\n")

    def __call__(self, prefix: str, suffix: str | None, *, sample: str, max_length: int | None = None) -> EncodedText:
        """Encode one sample.

        Args:
            prefix: the prompt, such as `caption en`.
            suffix: the target, or None when generating. "" is a target too: to say nothing, and so EOS at once.
            sample: id that errors name.
            max_length: most text tokens, BOS, newline and EOS included, image tokens not (PaliGemma's `text_len`). Only
                the suffix is ever cut.

        Raises:
            DataError: the prefix alone does not fit, or leaves no room for a token to learn.
        """
        head = [self._bos, *self._part(prefix, "prefix", sample), *self._newline]
        if max_length is not None and len(head) > max_length:
            raise DataError(
                f"sample {sample!r}: the prefix takes {len(head)} tokens with BOS and newline, at most {max_length}"
                f" fit;"
                " shorten it or raise max_text_length (a prefix is never cut)"
            )
        if suffix is None:
            return EncodedText(head, [], False)
        tail = self._part(suffix, "suffix", sample)
        room = len(tail) + 1 if max_length is None else max_length - len(head)
        if room < 1:
            raise DataError(
                f"sample {sample!r}: the prefix fills all {max_length} text tokens and leaves none to supervise;"
                f" raise max_text_length"
            )
        if len(tail) + 1 <= room:
            return EncodedText(head, [*tail, self._eos], False)
        # No EOS after a cut: it would teach the model to stop in the middle of a sentence.
        return EncodedText(head, tail[:room], True)

    def _part(self, text: str, name: str, sample: str) -> list[int]:
        if not isinstance(text, str):
            raise DataError(f"sample {sample!r}: the {name} is {type(text).__name__}, expected a string")
        try:
            return self._encode(text)
        except DataError as error:
            raise DataError(f"sample {sample!r}, {name}: {error}") from None
