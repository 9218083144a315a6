"""Making Gemma tokenizers, and turning a user's text into ids that are never control ids."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import AddedToken, GemmaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from vlm.errors import ConfigError, DataError
from vlm.text.piece_model import Kind, PieceModel, read_piece_model
from vlm.text.tokens import CONTROL_NAMES, IMAGE_TOKEN, LOC_TOKENS, SEG_TOKENS

MAX_CHARACTERS = 100_000
"""Longest text that is tokenised; a megabyte would take seconds and no decoder here has such a context."""

Tokenizer = Any
"""A transformers tokenizer of the Gemma family."""


def build(corpus: Iterable[str], *, vocab_size: int = 1000, loc_seg: bool = True) -> Tokenizer:
    """Train a small tokenizer laid out like PaliGemma's.

    A sentencepiece BPE model with Gemma's conventions (pad, eos, bos, unk = 0, 1, 2, 3; newline a piece of its own;
    byte fallback; no prefix space), then the tokens of `add_image_tokens`.

    Args:
        corpus: texts to learn pieces from. The same texts give the same tokenizer.
        vocab_size: pieces wanted, 256 bytes and control pieces included; fewer come out when the corpus cannot fill it.
        loc_seg: append the location and segmentation tokens.

    Returns:
        a transformers `GemmaTokenizer`.
    """
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "tokenizer"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_prefix=str(prefix),
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            eos_piece="<eos>",
            bos_piece="<bos>",
            unk_piece="<unk>",
            user_defined_symbols=["<mask>", "\n", "\n\n", "\t"],
            num_threads=1,
            minloglevel=2,
        )
        pieces = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    fixed = [p for p, i in vocab.items() if pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i)]
    tokenizer = GemmaTokenizer(vocab=vocab, merges=generate_merges(vocab, None, fixed))
    add_image_tokens(tokenizer, loc_seg=loc_seg)
    return tokenizer


def from_sentencepiece(path: str | Path) -> Tokenizer:
    """A Gemma tokenizer from a sentencepiece `.model` file, such as the one beside Google's original checkpoints.

    Cuts every text as sentencepiece does. User-defined pieces (newline runs, blanks, HTML tags) are added tokens, found
    before anything is merged; control pieces are special tokens; pad, eos, bos and unk are the model's own.

    Raises:
        ConfigError: no sentencepiece model, or one that a Gemma tokenizer cannot express: another algorithm than BPE, a
            normaliser, a prefix blank, no padding token.
    """
    model = read_piece_model(path)
    _check_is_gemmas(model, path)
    vocab = {piece.text: index for index, piece in enumerate(model.pieces)}
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind is Kind.NORMAL}
    fixed = [piece.text for piece in model.pieces if piece.kind is not Kind.NORMAL]
    names = {f"{name}_token": model.pieces[index].text for name, index in model.special.items()}
    # "<mask>" is a user-defined piece of Gemma: as a special token it would not be found where sentencepiece finds it.
    tokenizer = GemmaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores, fixed), mask_token=None, **names)  # type: ignore[arg-type]
    control = [p.text for p in model.pieces if p.kind is Kind.CONTROL and p.text not in names.values()]
    if control:
        tokenizer.add_special_tokens({"extra_special_tokens": [_token(text, special=True) for text in control]})
    # Normalised: sentencepiece looks for them after it has written blanks as U+2581.
    tokenizer.add_tokens(
        [AddedToken(p.text, normalized=True, special=False) for p in model.pieces if p.kind is Kind.USER_DEFINED]
    )
    return tokenizer


def _check_is_gemmas(model: PieceModel, path: str | Path) -> None:
    settings = model.normalizer
    expected = {
        "algorithm": (model.algorithm, "bpe"),
        "normaliser": (settings["name"] if settings["charsmap"] else "identity", "identity"),
        "add_dummy_prefix": (settings["add_dummy_prefix"], False),
        "remove_extra_whitespaces": (settings["remove_extra_whitespaces"], False),
        "escape_whitespaces": (settings["escape_whitespaces"], True),
    }
    for name, (got, wanted) in expected.items():
        if got != wanted:
            raise ConfigError(
                f"{path}: {name} is {got!r}, a Gemma tokenizer has {wanted!r}; give the tokenizer.model of a Gemma or"
                f" PaliGemma checkpoint"
            )
    for name, index in model.special.items():
        if not 0 <= index < len(model.pieces):
            raise ConfigError(f"{path}: has no {name} token (id {index}); a Gemma tokenizer has pad, eos, bos and unk")


def _token(text: str, *, special: bool) -> AddedToken:
    return AddedToken(text, normalized=False, special=special)


def add_image_tokens(tokenizer: Tokenizer, *, loc_seg: bool = True) -> int:
    """Append the tokens of PaliGemma that are missing: `<loc0000>`...`<loc1023>`, `<seg000>`...`<seg127>` (not
    special), then `<image>` (special). That is the order of the published vocabulary: 256,000 Gemma pieces, locations
    from 256000, segments from 257024, `<image>` 257152. Tokens that are there keep their ids.

    Returns:
        how many tokens were added; the embedding must grow by as many rows.
    """
    before = len(tokenizer)
    known = tokenizer.get_vocab()
    if loc_seg:
        tokenizer.add_tokens([token for token in LOC_TOKENS + SEG_TOKENS if token not in known])
    if IMAGE_TOKEN not in known:
        image = [_token(IMAGE_TOKEN, special=True)]
        tokenizer.add_special_tokens({"extra_special_tokens": image}, replace_extra_special_tokens=False)
    return len(tokenizer) - before


def image_token_id(tokenizer: Tokenizer) -> int:
    """Id of the `<image>` placeholder.

    Raises:
        ConfigError: the tokenizer has no such token.
    """
    found = tokenizer.get_vocab().get(IMAGE_TOKEN)
    if found is None:
        raise ConfigError(
            f"the tokenizer has no {IMAGE_TOKEN} token; add it with vlm.text.tokenizer.add_image_tokens(tokenizer)"
        )
    return int(found)


class TextEncoder:
    """Encodes user text to ids, so that no text can produce a control id.

    `<image>`, `<bos>`, `<eos>`, `<pad>` and every other special token typed by a user are data: they come out as the
    pieces of their characters. `<locDDDD>` and `<segDDD>` are PaliGemma's way to write coordinates and stay single
    tokens where they are allowed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
        special = {
            token: index for token, index in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        }
        coordinates = {t for t in (*LOC_TOKENS, *SEG_TOKENS) if t in added}
        # Gemma's other added tokens (newline runs, blanks, HTML tags) are pieces of ordinary text.
        self._control = {**{t: i for t, i in added.items() if CONTROL_NAMES.fullmatch(t)}, **special}
        self._coordinates = {t: added[t] for t in coordinates}

    def __call__(self, text: str, *, coordinates: bool = True) -> list[int]:
        """Ids of a text, without BOS or EOS.

        Args:
            text: any string; control tokens in it stay text.
            coordinates: keep `<loc>` and `<seg>` as single tokens.

        Raises:
            DataError: the text is longer than `MAX_CHARACTERS`, or holds a lone surrogate.
        """
        if len(text) > MAX_CHARACTERS:
            raise DataError(f"a text has {len(text):,} characters, at most {MAX_CHARACTERS:,} are accepted; shorten it")
        if re.search("[\ud800-\udfff]", text):
            raise DataError(
                f"a text holds a lone surrogate character and is not valid Unicode; remove it: {ascii(text[:60])}"
            )
        forbidden = self._control if coordinates else {**self._control, **self._coordinates}
        ids = self._encode(text)
        if not set(forbidden.values()).intersection(ids):
            return ids
        return self._encode_split(text, forbidden)

    def _encode(self, text: str) -> list[int]:
        # Not verbose: whoever asks for the ids decides about their number, and `model_max_length` warns in vain.
        settings = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return list(self.tokenizer(text, **settings)["input_ids"])

    def _encode_split(self, text: str, forbidden: dict[str, int]) -> list[int]:
        """Cut each forbidden token after its first character: the halves are ordinary text for the tokenizer."""
        pattern = "|".join(re.escape(token) for token in sorted(forbidden, key=len, reverse=True))
        cuts = [match.start() + 1 for match in re.finditer(pattern, text)]
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ids = [index for piece in pieces for index in self._encode(piece)]
        # With every spelling cut, what is left of <unk> stands for characters that the vocabulary does not have.
        if (set(forbidden.values()) - {self.tokenizer.unk_token_id}).intersection(ids):
            raise DataError(f"a text becomes a control token whatever is done; remove it: {ascii(text[:60])}")
        return ids
