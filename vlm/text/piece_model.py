"""Reads the pieces and settings of a sentencepiece `.model` file, without protobuf.

The sentencepiece package gives pieces and scores, but neither which pieces are user-defined nor how text is
normalised; both decide what a text becomes. The file is one protobuf message (`sentencepiece_model.proto`), of which
the few fields needed here are read. Nothing in it is executed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from vlm.errors import ConfigError


class Kind(IntEnum):
    """What a piece is (`SentencePiece.Type`)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


ALGORITHMS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
"""`TrainerSpec.ModelType`."""


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: Kind


@dataclass
class PieceModel:
    """A sentencepiece model; a piece's place in the list is its id.

    Attributes:
        algorithm: `bpe`, `unigram`, `word` or `char`.
        special: ids of `unk`, `bos`, `eos` and `pad`; -1 for one that the model does not have.
        normalizer: settings that change a text before it is cut: `name`, `charsmap` (whether it has one),
            `add_dummy_prefix`, `remove_extra_whitespaces`, `escape_whitespaces`.
    """

    pieces: list[Piece] = field(default_factory=list)
    algorithm: str = "unigram"
    special: dict[str, int] = field(default_factory=lambda: {"unk": 0, "bos": 1, "eos": 2, "pad": -1})
    normalizer: dict[str, Any] = field(
        default_factory=lambda: {
            "name": "",
            "charsmap": False,
            "add_dummy_prefix": True,
            "remove_extra_whitespaces": True,
            "escape_whitespaces": True,
        }
    )


def read_piece_model(path: str | Path) -> PieceModel:
    """Read a `.model` file.

    Raises:
        ConfigError: it cannot be read, or is no sentencepiece model.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a sentencepiece .model file") from None
    try:
        model = _decode(memoryview(data))
    except (ValueError, IndexError, struct.error) as error:
        raise ConfigError(f"{path}: is no sentencepiece model ({error}); give a sentencepiece .model file") from None
    if not model.pieces:
        raise ConfigError(f"{path}: is no sentencepiece model (it holds no pieces); give a sentencepiece .model file")
    return model


_SPECIAL_FIELDS = {40: "unk", 41: "bos", 42: "eos", 43: "pad"}
_NORMALIZER_FLAGS = {3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}


def _decode(data: memoryview) -> PieceModel:
    """Field numbers are those of `ModelProto`: 1 pieces, 2 trainer settings, 3 normaliser settings."""
    model = PieceModel()
    for number, value in _fields(data):
        if number == 1:
            model.pieces.append(_piece(_message(value)))
        elif number == 2:
            for inner, setting in _fields(_message(value)):
                if inner == 3:
                    model.algorithm = ALGORITHMS.get(int(setting), f"number {setting}")
                elif inner in _SPECIAL_FIELDS:
                    model.special[_SPECIAL_FIELDS[inner]] = _signed(int(setting))
        elif number == 3:
            for inner, setting in _fields(_message(value)):
                if inner == 1:
                    model.normalizer["name"] = str(bytes(_message(setting)), "utf-8")
                elif inner == 2:
                    model.normalizer["charsmap"] = len(_message(setting)) > 0
                elif inner in _NORMALIZER_FLAGS:
                    model.normalizer[_NORMALIZER_FLAGS[inner]] = bool(setting)
    return model


def _piece(data: memoryview) -> Piece:
    text, score, kind = "", 0.0, Kind.NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = str(bytes(_message(value)), "utf-8")
        elif number == 2:
            (score,) = struct.unpack("<f", _message(value))
        elif number == 3:
            kind = Kind(int(value))
    if not text:
        raise ValueError("a piece without text")
    return Piece(text, score, kind)


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: an integer, or the bytes of any other wire type."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire not in (1, 2, 5) or number == 0:
            raise ValueError(f"no field starts with {key}")
        size = 8 if wire == 1 else 4
        if wire == 2:
            size, at = _varint(data, at)
        if at + size > len(data):
            raise ValueError("it ends early")
        yield number, data[at : at + size]
        at += size


def _message(value: Any) -> memoryview:
    if not isinstance(value, memoryview):
        raise ValueError("a number where bytes are expected")
    return value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(value, where the next byte is): seven bits a byte, the lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends early")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")


def _signed(value: int) -> int:
    """A protobuf int32 is written as 64 bits; -1 is 2^64 - 1."""
    return value - (1 << 64) if value >> 63 else value
