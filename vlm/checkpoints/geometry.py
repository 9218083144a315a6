"""A trained model in another geometry: its image size, patch budget, feature layer or projector.

One function, `with_geometry`, is behind `vlm new --from`, the settings of a training stage, and `--image-size` of the
commands that run a model. What a change does not concern stays bit for bit; a position table is resampled as the
tower's file says, which for SigLIP is what big_vision does when it loads a checkpoint (PaliGemma's own stages 2 and 3);
another projector has new weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vlm.checkpoints.geometry_plan import image_sizes, planned
from vlm.checkpoints.loader import empty
from vlm.checkpoints.names import PROJECTOR, TOWER
from vlm.checkpoints.parts import as_tower
from vlm.checkpoints.source import Source, expected_shapes, place
from vlm.checkpoints.streams import seeded
from vlm.errors import ConfigError
from vlm.model import projecting
from vlm.model.config import VLMConfig
from vlm.model.forward import VLM
from vlm.model.parts import encoder_spec
from vlm.model.processor import Processor

logger = logging.getLogger(__name__)


def with_geometry(
    model: VLM,
    processor: Processor,
    *,
    image_size: int | list[int] | None = None,
    image: dict[str, Any] | None = None,
    layer: int | list[int] | None = None,
    projector: str | dict[str, Any] | None = None,
    encoder_kind: str | None = None,
    seed: int = 0,
) -> tuple[VLM, Processor]:
    """The same model in another geometry; the model given is not changed, and weights are shared, not copied.

    Args:
        image_size: side of the square images in pixels; the position table is resampled. For a fused tower a list, one
            for each member.
        image: settings of the image transform to change, such as `{"max_num_patches": 1024}` of a NaFlex tower.
        layer: feature layer, as for `vlm.new`; blocks above it leave the model.
        projector: another projector, or other settings of the same kind: its weights are new (a linear one starts at
            zero), and a warning says so. The settings that the model has are no change.
        encoder_kind: `siglip2_naflex` reads a SigLIP tower at any aspect ratio from now on, `siglip` a NaFlex one in
            squares: the same function at the image size, to rounding.
        seed: of a new projector's weights.

    Returns:
        (model in eval mode, processor), or those given where nothing changes.

    Raises:
        ConfigError: a change that this model cannot have, such as a feature layer that is wider than its projector.
    """
    config, transform = planned(
        model.config,
        processor.image_transform,
        image_size=image_size,
        image=image,
        layer=layer,
        projector=projector,
        encoder_kind=encoder_kind,
    )
    if config is model.config and transform == processor.image_transform:
        return model, processor
    if config is not model.config:
        model = _rebuilt(model, config, seed)
    return model, Processor(processor.tokenizer, transform, config.projector_config)


def _rebuilt(model: VLM, config: VLMConfig, seed: int) -> VLM:
    """The model of another configuration with the weights of this one, and those of a projector that is another."""
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent or getattr(model, "hf_device_map", None):
        raise ConfigError(
            "the geometry of a model with offloaded or placed parts cannot be changed; open it on one device"
        )
    made = empty(VLM, config)
    place(made, _source(model, made, seed), allow_nonfinite=True)
    made.tie_weights()  # the embedding is another tensor since `place`
    made.to(model.device)  # type: ignore[arg-type]  # constants; weights are there already
    made.generation_config = model.generation_config
    made.tower_head = model.tower_head
    _say(model.config, config)
    return made.eval()


def _source(model: VLM, made: VLM, seed: int) -> Source:
    """The tensors of the new model, by name: from the old one, but for the changed ones."""
    old, new = model.config, made.config
    state = {name: model.state_dict()[name] for name in expected_shapes(model)}
    tower = {name.removeprefix(TOWER): tensor for name, tensor in state.items() if name.startswith(TOWER)}
    if new.vision_config is not old.vision_config:
        wanted = expected_shapes(made.model.vision_tower)
        spec = encoder_spec(new.encoder)
        fitted = as_tower(_of(tower), spec, new.vision_config, wanted, resize_positions=True)
        tower = {name: fitted.read(name) for name in fitted.shapes}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(TOWER)}
    state |= {TOWER + name: tensor for name, tensor in tower.items()}
    if new.projector_config is not old.projector_config and new.projector_config != old.projector_config:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(PROJECTOR)}
        like = next(iter(state.values()))
        drawn = new_projector(new, seed)
        state |= {PROJECTOR + name: tensor.to(like) for name, tensor in drawn.items()}
    return _of(state)


def new_projector(config: VLMConfig, seed: int) -> dict[str, Tensor]:
    """Initial weights of a configuration's projector, from its own random stream."""
    weights: dict[str, Tensor] = {}
    width, decoder = encoder_spec(config.encoder).width(config.vision_config), config.text_config.hidden_size

    def draw() -> None:
        weights.update(projecting.build(config.projector_config, width, decoder).state_dict())

    seeded(seed, "projector", draw)
    return weights


def _of(tensors: Mapping[str, Tensor]) -> Source:
    read: Callable[[str], Tensor] = lambda name: tensors[name].detach()  # noqa: E731
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Source("the model", shapes, dict.fromkeys(shapes, "F32"), read)


def _say(old: VLMConfig, new: VLMConfig) -> None:
    """What has changed, for people."""
    before = image_sizes(old.encoder, old.vision_config)
    after = image_sizes(new.encoder, new.vision_config)
    if before != after and None not in before + after:
        shown = (" and ".join(map(str, sizes)) for sizes in (before, after))
        logger.info("image size %s -> %s px: position tables are resampled, all other weights stay", *shown)
    if old.projector_config != new.projector_config:
        logger.warning(
            "projector %s -> %s: its weights are new, and the model does not see until they are trained",
            *(old.projector_config, new.projector_config),
        )
