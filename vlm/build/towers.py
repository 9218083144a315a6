"""The vision tower of a new model: its kind, what it reads, its image transform."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from vlm.build.choice import Choice, Member
from vlm.build.recorded import image_transform, recorded_settings
from vlm.checkpoints import big_vision, big_vision_configs
from vlm.checkpoints.checks import NOTES, check_numbers, guarded
from vlm.checkpoints.configs import own_config, paligemma_config
from vlm.checkpoints.files import read_json
from vlm.checkpoints.geometry_plan import Tower, change_tower, read_as, set_image_size
from vlm.checkpoints.image_settings import known_settings
from vlm.checkpoints.places import locate
from vlm.checkpoints.preprocessing import own_transform
from vlm.encoders.fused import fuse as fuse_towers
from vlm.errors import ConfigError, nearest
from vlm.images.fused import FusedTransform, cells_shown
from vlm.images.transforms import ImageTransform
from vlm.model.config import VLMConfig
from vlm.model.parts import encoder_spec, model_types
from vlm.registry import kinds

logger = logging.getLogger(__name__)


def choose(
    encoder: Any,
    *,
    encoder_kind: str | None = None,
    image_size: int | None = None,
    image: dict[str, Any] | None = None,
    layer: int | list[int] = -1,
    fuse: dict[str, Any] | None = None,
) -> Choice:
    """What `vlm.new` makes of its `encoder` and the arguments that go with it (described there); no weight is read.

    Raises:
        ConfigError: towers that do not fit together, or settings that are unknown.
        CheckpointError: a checkpoint that cannot be opened.
    """
    sources = [sized(source) for source in several(encoder)]
    if image_size is not None and all(size is not None for _, size in sources):
        raise ConfigError(f"image_size={image_size}: {encoder} says its image size after the @; give one of the two")
    if len(sources) == 1:
        if fuse:
            raise ConfigError(f"fuse={fuse} is for several towers, and there is one; give A+B, or leave it out")
        member = _member(*sources[0], encoder_kind, image_size, layer)
        transform = image_transform(member, image or {})
        return Choice(member.kind, member.config, [member], transform)
    if encoder_kind is not None:
        raise ConfigError(f"encoder_kind={encoder_kind!r} reads one tower as another kind, and there are several")
    members = [_member(source, size, None, image_size, layer) for source, size in sources]
    known = ("grid", "resample")
    for key in fuse or {}:
        if key not in known:
            raise ConfigError(f"unknown fuse setting {key!r}{nearest(key, known)}; known: {', '.join(known)}")
    config = fuse_towers([(member.kind, member.config) for member in members], **(fuse or {}))
    kind = model_types()[config.model_type]
    notes = [recorded_settings(member, image or {}) for member in members]
    transform = encoder_spec(kind).transform(config, recorded=notes, **known_settings(image or {}))
    _say_resampled(config, transform)
    return Choice(kind, config, members, transform)


def several(encoder: Any) -> list[Any]:
    """The towers that an `encoder` argument names: a list, or `A+B` (unless a file or directory has that name)."""
    if isinstance(encoder, list | tuple):
        if not encoder:
            raise ConfigError("encoder is an empty list; give a checkpoint or a vision configuration")
        return list(encoder)
    if isinstance(encoder, str) and "+" in encoder and not Path(encoder).exists():
        names = encoder.split("+")
        if not all(names):
            raise ConfigError(f"encoder {encoder!r}: expected checkpoints joined by +, such as A+B")
        return names
    return [encoder]


def sized(source: Any) -> tuple[Any, int | None]:
    """`A@378` as (`A`, 378): a checkpoint with an image size of its own; anything else as (itself, None)."""
    if isinstance(source, str) and not Path(source).exists():
        name, at, size = source.rpartition("@")
        if at and size.isdigit():
            return name, int(size)
    return source, None


def _member(
    source: Any, size: int | None, encoder_kind: str | None, image_size: int | None, layer: int | list[int]
) -> Member:
    wanted = image_size if size is None else size
    source = located(source)
    if isinstance(source, Path) and (whole := _whole_model(source)) is not None:
        chosen = None if layer in (-1, [-1]) else layer
        made = change_tower(whole, image_size=wanted, layer=chosen, encoder_kind=encoder_kind, name=str(source))
        made.config.dtype = None
        return Member(source, made.kind, made.config, wanted is not None, made.transform)
    kind, config = _vision(source, encoder_kind, wanted)
    return Member(source, kind, encoder_spec(kind).choose_layers(kind, config, layer), wanted is not None)


def _whole_model(folder: Path) -> Tower | None:
    """The tower of a directory that `vlm.save` wrote, with the image transform that the model was trained with."""
    file = folder / "config.json"
    values = read_json(file) if file.is_file() else {}
    if values.get("model_type") != VLMConfig.model_type:
        return None
    config = own_config(values, str(file))
    return Tower(config.encoder, config.vision_config, own_transform(folder))


def _say_resampled(config: Any, transform: ImageTransform) -> None:
    """Warn where a fused tower's cells are not the cells of its members."""
    assert isinstance(transform, FusedTransform)
    rows, columns = transform.common_grid
    names = [kind for kind, _ in config.towers]
    for name, member in zip(names, transform.members, strict=True):
        own = member.grid(0, 0)
        if own != transform.common_grid:
            logger.warning(
                "fused tower: features of %s are resampled (%s) from its grid of %dx%d to %dx%d",
                name,
                config.resample,
                *own,
                rows,
                columns,
            )
    shown = [cells_shown(member) for member in transform.members]
    drift = rows * (max(shown) - min(shown))
    if drift > 0:
        logger.warning(
            "fused tower: %s leave the image's last pixels out and the others do not, so that cells that belong"
            " together drift apart by up to %.2f of a cell; image sizes that are multiples of the patch size agree",
            " and ".join(name for name, part_shown in zip(names, shown, strict=True) if part_shown < 1),
            drift,
        )


def located(source: Any) -> Any:
    """The folder or `.npz` file of a checkpoint; a configuration stays what it is."""
    if not isinstance(source, str | Path) or not str(source):
        return source
    return Path(source) if Path(source).suffix == ".npz" else locate(source)


def _vision(encoder: Any, kind: str | None, image_size: int | None) -> tuple[str, PreTrainedConfig]:
    if kind is not None and ":" in kind:
        encoder_spec(kind)  # refused with the way to make it known
    source, config = _own_vision(encoder, kind)
    for name, value in encoder_spec(source).fixed.items():
        setattr(config, name, value)
    config.dtype = None
    name = type(encoder).__name__ if isinstance(encoder, PreTrainedConfig) else str(encoder)
    if kind not in (None, source):
        config = read_as(config, source, str(kind), name, image_size)
    set_image_size(config, kind or source, image_size)
    return kind or source, config


def _own_vision(encoder: Any, own: str | None) -> tuple[str, PreTrainedConfig]:
    """(encoder kind, a configuration of its own) as the encoder says it."""
    if isinstance(encoder, dict):
        return _from_settings(encoder, own)
    if encoder is None or encoder == "":
        raise ConfigError("encoder is missing: give a checkpoint or a vision configuration")
    if isinstance(encoder, PreTrainedConfig):
        kind = model_types(own).get(encoder.model_type)
        if kind is None:
            raise ConfigError(f"no encoder takes a {type(encoder).__name__}; known: {', '.join(kinds('vlm.encoders'))}")
        spec = encoder_spec(kind)
        if type(encoder) is spec.config and spec.read is None:
            return kind, copy.deepcopy(encoder)
        return kind, spec.read_config({key: value for key, value in encoder.to_dict().items() if key not in NOTES})
    if encoder.suffix == ".npz":
        with big_vision.open_npz(encoder) as arrays:
            config = big_vision_configs.vision_config(big_vision.headers(arrays, str(encoder))[0], origin=str(encoder))
        return model_types()[config.model_type], config
    foreign = _foreign(encoder)
    if foreign is not None:
        return foreign
    values = config_file(encoder)
    if values.get("model_type") == "paligemma":
        return "siglip", paligemma_config(values, f"{encoder}/config.json").vision_config
    known = model_types(own)
    source = known.get(str(values.get("model_type")))
    if source is None:
        raise ConfigError(
            f"{encoder}: model_type is {values.get('model_type')!r}, expected a SigLIP checkpoint or another vision"
            f" tower: {', '.join(known)}"
        )
    vision = values.get("vision_config", values)
    check_numbers(vision, f"{encoder}: vision_config")
    settings = {key: value for key, value in vision.items() if key not in (*NOTES, "model_type")}
    return source, guarded(lambda: encoder_spec(source).read_config(settings), f"{encoder}: vision_config")


def _from_settings(values: dict[str, Any], own: str | None) -> tuple[str, PreTrainedConfig]:
    """New weights from keys and values, `model_type` among them."""
    known, stated = model_types(own), values.get("model_type")
    if stated not in known:
        raise ConfigError(
            f"encoder: model_type is {stated!r}{nearest(str(stated), known)}; known: {', '.join(sorted(known))}"
        )
    settings = {key: value for key, value in values.items() if key != "model_type"}
    return known[stated], guarded(lambda: encoder_spec(known[stated]).read_config(settings), "encoder", ConfigError)


def _foreign(folder: Path) -> tuple[str, PreTrainedConfig] | None:
    """The tower of a checkpoint that is not in transformers' format, by the encoder whose file recognises it."""
    if (folder / "config.json").is_file() and "model_type" in read_json(folder / "config.json"):
        return None
    for kind in kinds("vlm.encoders"):
        spec = encoder_spec(kind)
        file = folder / spec.config_file
        if spec.recognise is None or not file.is_file():
            continue
        settings = spec.recognise(read_json(file))
        if settings is not None:
            config: PreTrainedConfig = guarded(lambda: spec.read_config(settings), str(file))  # noqa: B023
            return kind, config
    return None


def config_file(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder}: no config.json; give a checkpoint directory or a hub id such as google/siglip-base-patch16-224"
        )
    return read_json(folder / "config.json")
