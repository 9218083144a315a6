"""Trained vision towers alone, each in its own library's format: for that library, and as `encoder` of a new model.

What a format has and a model does not (a pooling head, a mask token, a norm that no feature goes through) is the
checkpoint's that the tower came from, as `vlm.new` has kept it, or else at its initial value; the report says which.
A tower whose features are a lower layer is written as it is in the model, without the blocks above. The members of a
fused tower are written side by side, each in a directory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlm.checkpoints import big_vision
from vlm.checkpoints.big_vision_names import rules
from vlm.checkpoints.files import SINGLE, Weights
from vlm.checkpoints.layout import common_image_values, dtype_name, image_values, write_json
from vlm.checkpoints.loader import Source
from vlm.checkpoints.names import TOWER
from vlm.checkpoints.parts import directory_source, renaming
from vlm.checkpoints.shards import write_shards
from vlm.encoders.contract import Published
from vlm.errors import ConfigError
from vlm.images.fused import FusedTransform
from vlm.images.transforms import ImageTransform
from vlm.model.forward import VLM
from vlm.model.processor import Processor
from vlm.registry import part

OWN_TRANSFORM = "vlm_image_transform"
"""In a configuration file: the image transform as this library has it, with what other formats cannot say."""
KEEP = "Keep the vlm directory: `vlm new --encoder` reads the tower from it"


@dataclass(frozen=True)
class Alone:
    """One tower to write.

    Attributes:
        name: of its directory below the one to make; empty for a tower that is the only one.
        kind: the encoder's kind.
        tower: the module, with its configuration.
        image_transform: its own.
        head: what the tower's checkpoint had beside it: name in the library's file -> tensor.
        published: its library's format.
    """

    name: str
    kind: str
    tower: nn.Module
    image_transform: ImageTransform
    head: Mapping[str, Tensor]
    published: Published

    @property
    def config(self) -> Any:
        """The tower's configuration."""
        return self.tower.config

    @property
    def device(self) -> torch.device:
        """Where the tower is."""
        return next(self.tower.parameters()).device

    def missing(self) -> list[str]:
        """Names in the library's file for which there is no tensor, of the model or kept from its checkpoint."""
        own = {self.published.rename(name) for name in self.tower.state_dict()}
        return [name for name in needed(self.published) if name not in own and name not in self.head]


def parts(model: VLM, processor: Processor) -> list[Alone]:
    """The towers of a model.

    Raises:
        ConfigError: a tower whose file does not say what its library's format is, or that the format cannot hold.
    """
    inner: Any = model.model.vision_tower
    kept: Mapping[str, Tensor] = getattr(model, "tower_head", {})
    if not isinstance(processor.image_transform, FusedTransform):
        return [_alone("", model.config.encoder, inner, processor.image_transform, kept)]
    found = []
    towers = zip(model.config.vision_config.towers, inner.members, processor.image_transform.members, strict=True)
    for number, ((kind, _), module, transform) in enumerate(towers):
        prefix = f"members.{number}."
        head = {name.removeprefix(prefix): tensor for name, tensor in kept.items() if name.startswith(prefix)}
        found.append(_alone(f"{number + 1}-{kind}", kind, module, transform, head))
    return found


def _alone(name: str, kind: str, tower: nn.Module, transform: ImageTransform, head: Mapping[str, Tensor]) -> Alone:
    module = part("vlm.encoders", kind)
    if not hasattr(module, "published"):
        raise ConfigError(
            f"the vision tower is {kind!r}, and its file does not say in which format it stands alone (`published`, see"
            f" docs/encoders.md). {KEEP}"
        )
    shapes = {key: tuple(tensor.shape) for key, tensor in head.items()}
    published, beside = _fitting(module, tower.config, transform, tower.state_dict(), shapes)
    return Alone(name, kind, tower, transform, {key: head[key] for key in beside}, published)


def _fitting(
    module: Any,
    config: Any,
    transform: ImageTransform,
    own: Iterable[str],
    available: Mapping[str, tuple[int, ...]],
) -> tuple[Published, list[str]]:
    """The library's format with a pooling head if all that it needs beside the tower's own tensors is available, else
    without; and the names of what it takes."""
    for head in (available, None):
        published: Published = module.published(config, transform, head)
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
    tower: Any, module: Any, transform: ImageTransform, source: Source, names: Mapping[str, str]
) -> dict[str, Tensor]:
    """The tensors of a checkpoint that belong to a tower in its library's format, but are no part of it here.

    Args:
        names: name as the tower would have it, or as the whole checkpoint has it -> name in the source.
    """
    if not hasattr(module, "published"):
        return {}
    rename = module.published(tower.config, transform, None).rename
    spelled = {rename(name): stored for name, stored in names.items()} | dict(names)
    shapes = {name: tuple(source.shapes[stored]) for name, stored in spelled.items()}
    _, beside = _fitting(module, tower.config, transform, tower.state_dict(), shapes)
    return {name: source.read(spelled[name]) for name in beside}


def head_of(tower: Any, module: Any, transform: ImageTransform, path: Path) -> dict[str, Tensor]:
    """What the checkpoint of a tower has beside it and its library's format takes, by its name in the library's file.

    Args:
        path: a Hugging Face directory, a model directory of this library, or a big_vision `.npz`.
    """
    if (path / HEAD_FILE).is_file():
        return read_head(path)
    if path.suffix == ".npz":
        return _head_of_npz(tower, module, transform, path)
    source = directory_source(path, getattr(module, "WEIGHTS", SINGLE))
    names = {name: name for name in source.shapes}
    prefix = next((p for p in (TOWER, *module.PREFIXES) if any(name.startswith(p) for name in names)), "")
    rename = renaming(module)
    names |= {rename(name.removeprefix(prefix)): name for name in source.shapes if name.startswith(prefix)}
    return _kept(tower, module, transform, source, names)


def _head_of_npz(tower: Any, module: Any, transform: ImageTransform, path: Path) -> dict[str, Tensor]:
    with big_vision.open_npz(path) as arrays:
        shapes, dtypes = big_vision.headers(arrays, str(path))
        kept = {name: shape for name, shape in shapes.items() if name.startswith("img/MAPHead_0/")}
        if not kept:
            return {}
        found = rules(kept, two_towers=True, origin=str(path))
        source = big_vision.array_source(arrays, kept, dtypes, found, str(path))
        names = {name.removeprefix("vision_model."): name for name in source.shapes}
        return _kept(tower, module, transform, source, names)


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


def check(model: VLM, processor: Processor) -> None:
    """Refuse what no format can hold. Raises `ConfigError`."""
    parts(model, processor)


def write(
    folder: Path, alone: Alone, transform: ImageTransform, dtype: torch.dtype, max_shard_size: str | int
) -> dict[str, Tensor]:
    """Write all files of a tower's directory but the model card.

    Returns:
        name in the files -> the model's tensor.
    """
    published = alone.published
    values: dict[str, Any] = {**published.config, OWN_TRANSFORM: transform.to_dict()}
    if published.transformers:
        values |= {"architectures": [published.architecture], "dtype": dtype_name(dtype)}
        values["transformers_version"] = transformers.__version__
        del values[OWN_TRANSFORM]
        image = {**preprocessor_values(transform), OWN_TRANSFORM: transform.to_dict()}
        write_json(folder / "preprocessor_config.json", image)
    write_json(folder / published.config_file, values)
    tensors = {published.rename(name): tensor for name, tensor in alone.tower.state_dict().items()}
    tensors |= alone.head
    tensors |= _initial(published, alone.missing())
    # timm and open_clip know no shards.
    write_shards(folder, tensors, dtype, max_shard_size if published.transformers else 1 << 62)
    if published.weights != SINGLE:
        (folder / SINGLE).rename(folder / published.weights)
    return tensors


def _initial(published: Published, names: list[str]) -> dict[str, Tensor]:
    """What the library itself begins with, for tensors that no feature goes through."""
    if not names:
        return {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = published.build().state_dict()
    return {written: value for key, value in state.items() if (written := published.rename(key)) in names}


def opened(
    folder: Path, alone: Alone, by_transformers: Callable[..., Any], attention: Any = None, *, empty: bool = False
) -> Any:
    """The written tower, opened by its library in float32; strict.

    Args:
        by_transformers: `vlm.exchange.probes.opened`.
        empty: only names and shapes are compared, where the library can.
    """
    published = alone.published
    if published.transformers:
        return by_transformers(folder, attention, empty=empty)
    if published.opened is not None:
        return published.opened(folder).float()
    made = published.build()
    made.load_state_dict(load_file(folder / published.weights))
    return made.float()


def notes(towers: list[Alone]) -> list[str]:
    """What a reader of the written towers has to know."""
    said = []
    for one in towers:
        name = f"{one.name}: " if one.name else ""
        missing = one.missing()
        if one.head:
            said.append(
                f"{name}{len(one.head)} tensors that no patch feature goes through ({_shown(one.head)}) are those of"
                f" the checkpoint that the tower came from; they were not trained with it"
            )
        if missing:
            said.append(
                f"{name}{len(missing)} tensors that no patch feature goes through ({_shown(missing)}) are new: the"
                f" model has none, and none was kept"
            )
        layers = getattr(one.config, "feature_layers", None)
        if layers:
            said.append(
                f"{name}the features are the outputs of block {', '.join(map(str, layers))}, the blocks above are not"
                f" there; `vlm new --encoder` takes them so without --layer, in other programs they are hidden states"
            )
    return said


def _shown(names: Any) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


def preprocessor_values(transform: ImageTransform) -> dict[str, Any]:
    """Settings of transformers' SiglipImageProcessor, which squashes; of CLIPImageProcessor, which crops the middle; or
    of Siglip2ImageProcessor for NaFlex."""
    if transform.mode == "naflex":
        return {
            **common_image_values(transform),
            "image_processor_type": "Siglip2ImageProcessor",
            "max_num_patches": transform.max_num_patches,
            "patch_size": transform.patch_size,
        }
    if transform.mode == "crop":
        side = transform.image_size
        return {
            **common_image_values(transform),
            "image_processor_type": "CLIPImageProcessor",
            "do_center_crop": True,
            "crop_size": {"height": side, "width": side},
            "size": {"shortest_edge": transform.resize_shortest or side},
        }
    values = image_values(transform)
    del values["image_seq_length"]  # PaliGemma's own
    return values
