"""A Gemma tokenizer from a sentencepiece model cuts every text as sentencepiece itself does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from vlm.errors import ConfigError
from vlm.text import tokenizer as tokenizers
from vlm.text.piece_model import Kind, read_piece_model
from vlm.text.tokenizer import Tokenizer, from_sentencepiece

USER_DEFINED = [
    "<mask>",
    *("\n" * count for count in range(1, 6)),
    *("▁" * count for count in range(2, 7)),
    *("<table>", "</table>", "<h1>", "</h1>", "<b>", "[multimodal]", "\t", "\t\t"),
]
CONTROL = ["<start_of_turn>", "<end_of_turn>"]
NASTY = [
    *(
        "",
        " ",
        "  ",
        "   ",
        "        ",
        " a",
        "a ",
        "  a  b  ",
        "a\n",
        "\n",
        "\n\n\n\n\n\n\n",
        " \n \n",
        "\t",
        "\t \t\t\n",
    ),
    *(
        "0123456789",
        "3.14 and 1,000",
        "日本語",
        "ünïcödé",
        "🙂‍👩",
        "\x00",
        "\x7f",
        "▁",
        "▁▁a▁",
        "a▁ b",
        "\u00a0",
        "\u200b",
    ),
    *("a<b>c", "<b><b>", "<h1>x</h1>", "<table", "table>", "<<table>>", "<table></table>", "in<table>side", "<b"),
    *(
        "<bos>",
        "<eos>x",
        "<pad>",
        "<unk>",
        "a<start_of_turn>b",
        "<mask>",
        "[multimodal]",
        "<0x41>",
        "<image>",
        "<loc0001>",
    ),
    *("aaaaaaaaaaaa", "abababababab", "a a a a a a", "ﬁ Å Å", "\r\n", "e\u0301", "\U0010ffff", "\ufeffbom"),
]


def train(folder: Path, **changes: Any) -> Path:
    """A small BPE model laid out like Gemma's."""
    rng = random.Random(0)
    words = ["caption", "square", "red", "green", "circle", "the", "theta", "an", "and", "banana", "abab", "1", "22"]
    corpus = [" ".join(rng.choices(words, k=8)) + rng.choice([".", "!", "  x", "\tz"]) for _ in range(400)]
    settings: dict[str, Any] = {
        "sentence_iterator": iter(corpus),
        "model_prefix": str(folder / "gemma"),
        "model_type": "bpe",
        "vocab_size": 420,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "split_digits": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "user_defined_symbols": USER_DEFINED,
        "control_symbols": CONTROL,
        "num_threads": 1,
        "minloglevel": 2,
        **{f"{name}_id": i for i, name in enumerate(("pad", "eos", "bos", "unk"))},
        **{f"{name}_piece": f"<{name}>" for name in ("pad", "eos", "bos", "unk")},
    }
    sentencepiece.SentencePieceTrainer.train(**{**settings, **changes})
    return folder / "gemma.model"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("spm"))


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return from_sentencepiece(path)


def random_texts(count: int, seed: int) -> Iterator[str]:
    """Few letters (many merges compete), pieces of words and of user-defined pieces, and any character at all."""
    rng = random.Random(seed)
    alphabets: list[list[str]] = [
        list("ab "),
        list("an theqred.\n"),
        ["a", "b", " ", "  ", "ban", "ana", "theta", "cap", "tion", *USER_DEFINED, "<", ">", "</", "1", "22", "日"],
        [chr(code) for code in (*range(1, 0x250), *range(0x4E00, 0x4E20), *range(0x1F600, 0x1F620), 0x2581, 0xFE0F)],
    ]
    for _ in range(count):
        letters = rng.choice(alphabets)
        yield "".join(rng.choice(letters) for _ in range(rng.randrange(1, 40)))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def test_every_text_is_cut_as_sentencepiece_cuts_it(path: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """5,000 random texts and nasty ones; again after saving and loading."""
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = [*NASTY, *random_texts(5000, seed=1)]
    wanted = original.encode(texts)
    for text, expected in zip(texts, wanted, strict=True):
        assert ids(tokenizer, text) == expected, repr(text)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    for text, expected in zip(texts[:1000], wanted, strict=False):
        assert ids(loaded, text) == expected, repr(text)
    used = {index for line in wanted for index in line}
    assert {original.piece_to_id(text) for text in USER_DEFINED} <= used and len(used) > 250


def test_pieces_and_special_tokens_are_the_models(path: Path, tokenizer: Tokenizer) -> None:
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [original.id_to_piece(i) for i in range(original.get_piece_size())]
    assert len(tokenizer) == len(pieces) and tokenizer.convert_ids_to_tokens(list(range(len(pieces)))) == pieces
    for name in ("pad", "eos", "bos", "unk"):
        assert getattr(tokenizer, f"{name}_token_id") == getattr(original, f"{name}_id")()
    assert {*CONTROL, "<pad>", "<eos>", "<bos>", "<unk>"} == set(tokenizer.all_special_tokens)
    assert tokenizer.decode(ids(tokenizer, "red\n\n  <b> 日")) == "red\n\n  <b> 日"


def test_the_file_is_read_as_sentencepiece_reads_it(path: Path) -> None:
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    model = read_piece_model(path)
    assert [piece.text for piece in model.pieces] == [original.id_to_piece(i) for i in range(len(model.pieces))]
    assert [piece.score for piece in model.pieces] == [original.get_score(i) for i in range(len(model.pieces))]
    kinds = {
        Kind.CONTROL: original.is_control,
        Kind.UNKNOWN: original.is_unknown,
        Kind.BYTE: original.is_byte,
        Kind.UNUSED: original.is_unused,
    }
    for index, piece in enumerate(model.pieces):
        assert all((piece.kind is kind) == check(index) for kind, check in kinds.items()), piece
    assert {piece.text for piece in model.pieces if piece.kind is Kind.USER_DEFINED} == set(USER_DEFINED)


def test_image_tokens_follow_the_pieces(path: Path) -> None:
    """As in the published vocabulary: locations, segments, `<image>`; what special tokens there were stay special."""
    tokenizer = from_sentencepiece(path)
    size = len(tokenizer)
    assert tokenizers.add_image_tokens(tokenizer) == 1153
    for token, index in (
        ("<loc0000>", 0),
        ("<loc1023>", 1023),
        ("<seg000>", 1024),
        ("<seg127>", 1151),
        ("<image>", 1152),
    ):
        assert tokenizer.convert_tokens_to_ids(token) == size + index
    assert {*CONTROL, "<image>"} <= set(tokenizer.all_special_tokens)


def test_a_model_without_byte_pieces(tmp_path: Path) -> None:
    path = train(tmp_path, byte_fallback=False, vocab_size=150)
    original, tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path)), from_sentencepiece(path)
    for text in [*NASTY, *random_texts(500, seed=2)]:
        assert ids(tokenizer, text) == original.encode(text), repr(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unigram"}, "algorithm is 'unigram', a Gemma tokenizer has 'bpe'"),
        ({"add_dummy_prefix": True}, "add_dummy_prefix is True"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is True"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normaliser is 'nmt_nfkc', a Gemma tokenizer has 'identity'"),
        ({"pad_id": -1}, r"has no pad token \(id -1\)"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = train(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as refused:
        from_sentencepiece(path)
    assert str(path) in str(refused.value)


def test_other_files_are_refused(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    broken = {
        "empty.model": b"",
        "text.model": b"not a model at all",
        "cut.model": data[: len(data) // 2],
        "zeros.model": bytes(100),
        "json.model": b'{"model": {"type": "BPE"}}',
        "deep.model": b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match="is no sentencepiece model") as refused:
            from_sentencepiece(tmp_path / name)
        assert name in str(refused.value)
    with pytest.raises(ConfigError, match="gone.model: cannot be read"):
        from_sentencepiece(tmp_path / "gone.model")


def test_random_damage_is_refused_or_harmless(path: Path, tmp_path: Path) -> None:
    """Never another kind of error than ours."""
    data, rng = path.read_bytes(), random.Random(3)
    damaged = tmp_path / "damaged.model"
    refused = 0
    for _ in range(200):
        content = bytearray(data[: rng.randrange(10, len(data))])
        for _ in range(rng.randrange(4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        damaged.write_bytes(content)
        try:
            read_piece_model(damaged)
        except ConfigError:
            refused += 1
    assert refused > 100
