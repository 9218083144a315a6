"""What a tower's checkpoint has beside the tower: a pooling head, a mask token, a norm that no feature goes through.

It is no part of the model, and is kept beside it for an export of the tower in its library's format.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor

from vlm.checkpoints import big_vision
from vlm.checkpoints.names import TOWER
from vlm.checkpoints.source import Source
from vlm.checkpoints.weights import Weights, directory_source
from vlm.encoders.contract import Published, Spec
from vlm.errors import ConfigError
from vlm.images.transforms import ImageTransform


def fitting(
    spec: Spec,
    config: Any,
    transform: ImageTransform,
    own: Iterable[str],
    available: Mapping[str, tuple[int, ...]],
) -> tuple[Published, list[str]]:
    """The library's format with a pooling head if all that it needs beside the tower's own tensors is available, else
    without; and the names of what it takes."""
    assert spec.published is not None
    for head in (available, None):
        published = spec.published(config, transform, head)
        written = {published.rename(name) for name in own}
        absent = {name: shape for name, shape in needed(published).items() if name not in written}
        if all(available.get(name) == shape for name, shape in absent.items()):
            return published, list(absent)
    return published, [name for name, shape in absent.items() if available.get(name) == shape]


def needed(published: Published) -> dict[str, tuple[int, ...]]:
    """Name in the library's file -> shape, of every tensor that its own model has. Counters of batch norms, which are
    integers and used with momentum None only, are left out."""
    with init_empty_weights(include_buffers=True):
        whole = published.build()
    state = whole.state_dict().items()
    return {published.rename(key): tuple(value.shape) for key, value in state if not key.endswith(COUNTER)}


COUNTER = "num_batches_tracked"


def _kept(
    tower: Any, spec: Spec, transform: ImageTransform, source: Source, names: Mapping[str, str]
) -> dict[str, Tensor]:
    """The tensors of a checkpoint that belong to a tower in its library's format, but are no part of it here.

    Args:
        names: name as the tower would have it, or as the whole checkpoint has it -> name in the source.
    """
    if spec.published is None:
        return {}
    try:
        rename = spec.published(tower.config, transform, None).rename
    except ConfigError:  # its format cannot hold this tower: an export says so, and a model can be made all the same
        return {}
    spelled = {rename(name): stored for name, stored in names.items()} | dict(names)
    shapes = {name: tuple(source.shapes[stored]) for name, stored in spelled.items()}
    _, beside = fitting(spec, tower.config, transform, tower.state_dict(), shapes)
    return {name: source.read(spelled[name]) for name in beside}


def head_of(tower: Any, spec: Spec, transform: ImageTransform, path: Path) -> dict[str, Tensor]:
    """What the checkpoint of a tower has beside it and its library's format takes, by its name in the library's file.

    Args:
        path: a Hugging Face directory, a model directory of this library, or a big_vision `.npz`.
    """
    if (path / HEAD_FILE).is_file():
        return read_head(path)
    if path.suffix == ".npz":
        return _head_of_npz(tower, spec, transform, path)
    source = directory_source(path, spec.weights_file)
    names = {name: name for name in source.shapes}
    prefix = next((p for p in (TOWER, *spec.prefixes) if any(name.startswith(p) for name in names)), "")
    names |= {spec.rename(name.removeprefix(prefix)): name for name in source.shapes if name.startswith(prefix)}
    return _kept(tower, spec, transform, source, names)


def _head_of_npz(tower: Any, spec: Spec, transform: ImageTransform, path: Path) -> dict[str, Tensor]:
    with big_vision.open_npz(path) as arrays:
        source = big_vision.source(arrays, str(path), two_towers=True, wanted="img/MAPHead_0/")
        if not source.shapes:
            return {}
        names = {name.removeprefix("vision_model."): name for name in source.shapes}
        return _kept(tower, spec, transform, source, names)


HEAD_FILE = "tower_head.safetensors"
"""In a model directory: what the tower's checkpoint had beside the tower, for an export of the tower."""


def read_head(folder: Path) -> dict[str, Tensor]:
    """What `write_head` wrote; empty where it wrote nothing."""
    if not (folder / HEAD_FILE).is_file():
        return {}
    weights = Weights(folder, HEAD_FILE)
    return {name: weights.read(name) for name in weights.tensors}


def write_head(folder: Path, head: Mapping[str, Tensor]) -> None:
    """Keep it beside a model's weights; nothing is written where there is none."""
    if head:
        save_file({name: tensor.contiguous() for name, tensor in head.items()}, folder / HEAD_FILE)
