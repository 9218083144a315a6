"""Trained vision towers alone, each in its own library's format: for that library, and as `encoder` of a new model.

What a format has and a model does not (a pooling head, a mask token, a norm that no feature goes through) is the
checkpoint's that the tower came from, as `vlm.new` has kept it, or else at its initial value; the report says which.
A tower whose features are a lower layer is written as it is in the model, without the blocks above. The members of a
fused tower are written side by side, each in a directory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from vlm.checkpoints.files import SINGLE
from vlm.checkpoints.image_settings import OWN_TRANSFORM
from vlm.checkpoints.shards import write_shards
from vlm.checkpoints.tower_head import fitting, needed
from vlm.encoders.contract import Published
from vlm.errors import ConfigError
from vlm.exchange.hub_files import preprocessor_values, write_json
from vlm.images.transforms import ImageTransform
from vlm.model.dtypes import dtype_name
from vlm.model.forward import VLM
from vlm.model.parts import encoder_spec
from vlm.model.processor import Processor

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
    kept: Mapping[str, Tensor] = model.tower_head
    if not processor.image_transform.members:
        return [_alone("", model.config.encoder, inner, processor.image_transform, kept)]
    found = []
    towers = zip(model.config.vision_config.towers, inner.members, processor.image_transform.members, strict=True)
    for number, ((kind, _), module, transform) in enumerate(towers):
        prefix = f"members.{number}."
        head = {name.removeprefix(prefix): tensor for name, tensor in kept.items() if name.startswith(prefix)}
        found.append(_alone(f"{number + 1}-{kind}", kind, module, transform, head))
    return found


def _alone(name: str, kind: str, tower: nn.Module, transform: ImageTransform, head: Mapping[str, Tensor]) -> Alone:
    spec = encoder_spec(kind)
    if spec.published is None:
        raise ConfigError(
            f"the vision tower is {kind!r}, and its file does not say in which format it stands alone (`published`, see"
            f" docs/encoders.md). {KEEP}"
        )
    shapes = {key: tuple(tensor.shape) for key, tensor in head.items()}
    published, beside = fitting(spec, tower.config, transform, tower.state_dict(), shapes)
    return Alone(name, kind, tower, transform, {key: head[key] for key in beside}, published)


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
        by_transformers: `vlm.exchange.theirs.opened`.
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
        layers = encoder_spec(one.kind).chosen_layers(one.config)
        if layers:
            said.append(
                f"{name}the features are the outputs of block {', '.join(map(str, layers))}, the blocks above are not"
                f" there; `vlm new --encoder` takes them so without --layer, in other programs they are hidden states"
            )
    return said


def _shown(names: Any) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")
