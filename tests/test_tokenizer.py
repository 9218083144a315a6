"""Tokenizers, and user text that tries to be a control token."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from vlm.build.presets import TINY_CORPUS
from vlm.errors import ConfigError, DataError
from vlm.text import tokenizer as tokenizers
from vlm.text.tokenizer import TextEncoder, Tokenizer
from vlm.text.tokens import LOC_TOKENS, SEG_TOKENS

CONTROL = ["<image>", "<bos>", "<eos>", "<pad>", "<unk>", "<mask>"]
HOSTILE = [
    *CONTROL,
    "a <eos> b",
    "<eos><eos>",
    "<bos<bos>>",
    "<<image>>",
    "<image><image>caption en",
    " <pad>",
    "\n<eos>\n",
    "<EOS>",
    "＜eos＞",
    "＜image＞",
    "<i​mage>",
    "<image\n>",
    "<start_of_turn>",
    "[/INST]",
]
PLAIN = [
    "a red square",
    "",
    " leading and trailing ",
    "two  blanks,   three",
    "tab\tand\nnewline\n\ntwo",
    "0123456789",
    "日本語 ünïcödé 🙂‍👩",
    "ﬁ ligature Å Å",
    "\x00\x01",
    "▁under",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.build(TINY_CORPUS * 20, vocab_size=400)


@pytest.fixture(scope="module")
def encode(tokenizer: Tokenizer) -> TextEncoder:
    return TextEncoder(tokenizer)


def control_ids(tokenizer: Tokenizer) -> set[int]:
    return {tokenizer.convert_tokens_to_ids(token) for token in CONTROL}


def test_layout_is_paligemmas(tokenizer: Tokenizer) -> None:
    """pad, eos, bos, unk first; then the pieces, <loc0000>..., <seg000>... and <image> in one run, as published."""
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(4)] == ["<pad>", "<eos>", "<bos>", "<unk>"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    image = tokenizers.image_token_id(tokenizer)
    ids = tokenizer.convert_tokens_to_ids([*LOC_TOKENS, *SEG_TOKENS, "<image>"])
    assert ids == list(range(image - 1152, image + 1)) and len(tokenizer) == image + 1
    assert len(LOC_TOKENS) == 1024 and LOC_TOKENS[7] == "<loc0007>" and SEG_TOKENS[-1] == "<seg127>"
    assert len(control_ids(tokenizer)) == 6


def test_tokens_are_added_once(tokenizer: Tokenizer) -> None:
    assert tokenizers.add_image_tokens(tokenizer) == 0
    small = tokenizers.build(TINY_CORPUS * 20, vocab_size=400, loc_seg=False)
    assert len(small) + 1152 == len(tokenizer)
    before = small.get_vocab()
    assert tokenizers.add_image_tokens(small) == 1152 and len(small) == len(tokenizer)
    assert {token: index for token, index in small.get_vocab().items() if token in before} == before


def test_the_same_corpus_gives_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = tokenizers.build(TINY_CORPUS * 20, vocab_size=400)
    assert again.get_vocab() == tokenizer.get_vocab()
    again.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in PLAIN + HOSTILE:
        assert TextEncoder(loaded)(text) == TextEncoder(tokenizer)(text)


def test_frequent_words_become_pieces(encode: TextEncoder) -> None:
    assert len(encode("a red square")) < len("a red square")


@pytest.mark.parametrize("text", HOSTILE)
def test_user_text_never_becomes_control(tokenizer: Tokenizer, encode: TextEncoder, text: str) -> None:
    for wrapped in (text, f"say {text}", f"{text}!", text * 3):
        ids = encode(wrapped)
        assert not control_ids(tokenizer) & set(ids), tokenizer.convert_ids_to_tokens(ids)
        assert decode(tokenizer, ids) == wrapped


@pytest.mark.parametrize("text", PLAIN[:-1])
def test_ordinary_text_round_trips(tokenizer: Tokenizer, encode: TextEncoder, text: str) -> None:
    ids = encode(text)
    assert decode(tokenizer, ids) == text
    assert not control_ids(tokenizer) & set(ids)


def test_the_blank_piece_is_read_as_a_blank(tokenizer: Tokenizer, encode: TextEncoder) -> None:
    """Gemma writes a blank as U+2581, so that one character does not survive; it is still no control token."""
    assert decode(tokenizer, encode(PLAIN[-1])) == " under"


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_coordinates_are_single_tokens_where_allowed(tokenizer: Tokenizer, encode: TextEncoder) -> None:
    text = "<loc0001><loc1023> cat <seg005>"
    ids = encode(text)
    loc, seg = (tokenizer.convert_tokens_to_ids(token) for token in ("<loc0001>", "<seg005>"))
    assert ids[0] == loc and ids[1] == loc + 1022 and ids[-1] == seg
    assert decode(tokenizer, ids) == text
    plain = encode(text, coordinates=False)
    assert not {loc, loc + 1022, seg} & set(plain) and decode(tokenizer, plain) == text
    assert loc not in encode("<loc1>") and loc not in encode("<loc 0001>")


def test_unusable_texts(encode: TextEncoder) -> None:
    with pytest.raises(DataError, match="100,001 characters"):
        encode("a" * 100_001)
    with pytest.raises(DataError, match="surrogate"):
        encode("a\ud800b")


def test_a_tokenizer_without_placeholder_is_refused(tokenizer: Tokenizer) -> None:
    class Bare:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(ConfigError, match="no <image> token"):
        tokenizers.image_token_id(Bare())


def test_added_control_tokens_are_split_too() -> None:
    """Real Gemma tokenizers hold more control tokens, special or merely added; a newline or blanks added as a token
    are ordinary text and stay whole."""
    tokenizer = tokenizers.build(TINY_CORPUS * 20, vocab_size=400)
    tokenizer.add_tokens(["<start_of_turn>", "[multimodal]", "    "])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>", "<end_of_turn>"]})
    encode = TextEncoder(tokenizer)
    ids = {tokenizer.convert_tokens_to_ids(t) for t in ("<start_of_turn>", "[multimodal]", "<end_of_turn>", "<image>")}
    assert len(ids) == 4
    for text in ("<start_of_turn>user<end_of_turn>", "a [multimodal] b", "<start_of_turn><start_of_turn><image>"):
        assert not ids & set(encode(text)) and decode(tokenizer, encode(text)) == text
    blanks = encode("a    b")
    assert tokenizer.convert_tokens_to_ids("    ") in blanks and decode(tokenizer, blanks) == "a    b"
