"""Google's own checkpoints: big_vision `.npz` files of PaliGemma 1 and 2, SigLIP and SigLIP 2 (FixRes and NaFlex).

Layers stored one by one or stacked (scanned), query/key/value fused or not, float32, float16, or bfloat16 (which numpy
stores as two raw bytes). Sizes are read from the arrays; what they do not show (soft-caps, the query scale) is Gemma
2's published value unless big_vision's own model settings are given.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from vlm.checkpoints.big_vision_names import Rule, Shapes, rules, to_array
from vlm.checkpoints.files import check_regular
from vlm.checkpoints.source import Source
from vlm.errors import CheckpointError

Arrays = Mapping[str, np.ndarray]
DTYPE_NAMES = {"V2": "BF16", "float32": "F32", "float16": "F16"}


@contextmanager
def open_npz(path: str | Path) -> Iterator[Arrays]:
    """The arrays of a `.npz`, read when they are asked for, without the leading `params/` of their names.

    Raises:
        CheckpointError: not a regular file, not an archive of arrays, or arrays that would need pickle.
    """
    check_regular(Path(path))
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: not a complete .npz file (no zip archive); copy it again")
    with _reading(str(path)):
        archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise CheckpointError(f"{path}: a single array, expected an .npz archive of big_vision")
    with archive:
        yield _Archive(archive, str(path))


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """What zipfile and numpy raise for a damaged archive becomes a CheckpointError."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError, NotImplementedError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not a complete .npz file ({error}); copy it again") from error


class _Archive(Mapping[str, np.ndarray]):
    """Arrays by their name without `params/`; the shapes come from the headers alone."""

    def __init__(self, archive: Any, path: str) -> None:
        self._archive, self._path = archive, path
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        self._names = {name.removeprefix("params/"): name for name in archive.files}
        if len(self._names) != len(archive.files):
            raise CheckpointError(f"{path}: the same array with and without params/ in its name")

    def __getitem__(self, name: str) -> np.ndarray:
        with _reading(self._path):
            return cast(np.ndarray, self._archive[self._names[name]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """(shape, dtype name) of an array, without its data; read once."""
        if name not in self._headers:
            self._headers[name] = self._read_header(name)
        return self._headers[name]

    def _read_header(self, name: str) -> tuple[tuple[int, ...], str]:
        with _reading(self._path), self._archive.zip.open(self._names[name] + ".npy") as file:
            version = np.lib.format.read_magic(file)
            read: Any = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in read:
                raise CheckpointError(f"{self._path}: {name} is in an unknown .npy version {version}")
            shape, _, dtype = read[version](file)
        return shape, _dtype_name(dtype, name, self._path)


def _dtype_name(dtype: np.dtype, name: str, path: str) -> str:
    text = dtype.str.lstrip("|<=") if dtype.kind == "V" else dtype.name
    if text not in DTYPE_NAMES:
        raise CheckpointError(f"{path}: array {name} is of type {dtype}, expected float32, float16 or bfloat16")
    return DTYPE_NAMES[text]


def headers(arrays: Arrays, origin: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """(shapes, dtype names) of all arrays by big_vision name."""
    if isinstance(arrays, _Archive):
        found = {name: arrays.header(name) for name in arrays}
    else:
        found = {name: (tuple(a.shape), _dtype_name(a.dtype, name, origin)) for name, a in arrays.items()}
    return {name: shape for name, (shape, _) in found.items()}, {name: dtype for name, (_, dtype) in found.items()}


def source(arrays: Arrays, origin: str, *, two_towers: bool, wanted: str = "") -> Source:
    """The arrays as parameters, listed array by array. One array is held at a time: stacked layers are read once when
    parameters are read in the order of `shapes`.

    Args:
        two_towers: parameters get the names of transformers' SiglipModel, else those of `vlm.VLM`.
        wanted: regular expression of how names of arrays begin; the others are left out.

    Raises:
        CheckpointError: arrays that no rule knows, or two that hold the same parameter.
    """
    shapes, dtypes = headers(arrays, origin)
    kept = {name: shape for name, shape in shapes.items() if re.match(wanted, name)}
    return _listed(arrays, dtypes, rules(kept, two_towers=two_towers, origin=origin), origin)


def _listed(arrays: Arrays, dtypes: Mapping[str, str], found: Mapping[str, Rule], origin: str) -> Source:
    places: dict[str, str] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    thirds: dict[str, list[str]] = {}
    for name, rule in found.items():
        for parameter in rule.names:
            whole, _, third = parameter.partition("#")
            if third:
                thirds.setdefault(whole, []).append(parameter)
            if parameter in places:
                raise CheckpointError(f"{origin}: {name} and {places[parameter]} both hold {parameter}")
            places[parameter], sizes[parameter] = name, rule.shape()
    held: dict[str, Tensor] = {}

    def single(parameter: str) -> Tensor:
        name = places[parameter]
        if name not in held:
            held.clear()
            held[name] = to_array(arrays[name])
        return found[name].part(held[name], found[name].names.index(parameter))

    def read(parameter: str) -> Tensor:
        if parameter in thirds:
            return torch.cat([single(f"{parameter}#{i}") for i in range(3)])
        return single(parameter)

    whole_shapes = {name: shape for name, shape in sizes.items() if "#" not in name}
    for name, parts in thirds.items():
        if len(parts) == 3:
            first = sizes[f"{name}#0"]
            whole_shapes[name] = (3 * first[0], *first[1:])
    return Source(
        origin, whole_shapes, {n: dtypes[places.get(n, places.get(n + "#0", ""))] for n in whole_shapes}, read
    )


def encode(tensors: Mapping[str, Tensor], shapes: Shapes, *, two_towers: bool) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, as big_vision's arrays: the inverse of reading them.

    Args:
        tensors: live name -> tensor.
        shapes: big_vision name -> shape of the arrays wanted, as a checkpoint has them.
        two_towers: the names are those of transformers' SiglipModel.

    Returns:
        big_vision name -> float32 array.
    """
    rebuilt = rebuild(tensors, shapes, two_towers=two_towers)
    return {name: tensor.detach().float().cpu().numpy() for name, tensor in rebuilt}


def rebuild(tensors: Mapping[str, Tensor], shapes: Shapes, *, two_towers: bool) -> Iterator[tuple[str, Tensor]]:
    """As `encode`, one (big_vision name, tensor in the parameters' dtype) after the other.

    Raises:
        CheckpointError: a parameter that an array needs is not there.
    """
    tensors = dict(tensors)
    for name in [n for n in tensors if ".in_proj_" in n]:
        tensors |= {f"{name}#{i}": piece for i, piece in enumerate(tensors[name].chunk(3))}
    for name, rule in rules(shapes, two_towers=two_towers, origin="big_vision shapes").items():
        absent = [parameter for parameter in rule.names if parameter not in tensors]
        if absent:
            raise CheckpointError(f"array {name} needs {absent[0]}, which the model does not have")
        yield name, rule.join(tensors, tuple(shapes[name]))
