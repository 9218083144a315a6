"""Every file in vlm/encoders and vlm/projectors keeps the contract; a new file is picked up by itself."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import picture
from encodertools import ENCODERS, brighter, build, each_encoder, each_fixed, inputs, needs, tower_of
from torch import Tensor

import vlm
from vlm.build.presets import tiny
from vlm.build.towers import choose
from vlm.encoders._layers import feature_width
from vlm.encoders.contract import EncoderOutput
from vlm.encoders.fused import fuse
from vlm.errors import ConfigError
from vlm.images.fused import open_transform
from vlm.model.parts import encoder_spec
from vlm.registry import kinds, part
from vlm.train import freezing
from vlm.train.stage_config import StageConfig

PROJECTORS = kinds("vlm.projectors")
SIZES = [(70, 30), (25, 80), (40, 40)]


def test_the_known_kinds_are_found() -> None:
    assert {"siglip", "siglip2_naflex", "fused", "timm", "open_clip"} <= set(ENCODERS) and {"linear", "mlp"} <= set(
        PROJECTORS
    )
    for package, names in (("vlm.encoders", ENCODERS), ("vlm.projectors", PROJECTORS)):
        for name in names:
            assert "arXiv" in (part(package, name).__doc__ or ""), f"{name} names no paper"


@each_encoder
def test_output_shapes(kind: str) -> None:
    """float[M, P, E], bool[M, P] or None, int64[M, 2]; the grid is what the transform promised."""
    config, tower, transform = build(kind)
    tensors, grids = inputs(transform, [picture(i, size) for i, size in enumerate(SIZES)])
    out = tower(**tensors)
    assert isinstance(out, EncoderOutput)
    assert out.features.shape[0] == 3 and out.features.shape[2] == feature_width(config)
    assert out.grid.dtype == torch.int64 and [tuple(row) for row in out.grid.tolist()] == grids
    counts = out.grid.prod(1)
    assert out.features.shape[1] == int(counts.max()) <= transform.max_patches
    if out.mask is None:
        assert (counts == out.features.shape[1]).all()
    else:
        assert out.mask.dtype == torch.bool and out.mask.shape == out.features.shape[:2]
        assert torch.equal(out.mask.sum(1), counts)
    assert torch.isfinite(out.features).all()


@each_encoder
def test_each_image_alone_gives_the_same_features(kind: str) -> None:
    _, tower, transform = build(kind)
    images = [picture(i, size) for i, size in enumerate(SIZES)]
    with torch.no_grad():
        together = tower(**inputs(transform, images)[0])
        for i, image in enumerate(images):
            alone = tower(**inputs(transform, [image])[0]).features[0]
            rows = slice(None) if together.mask is None else together.mask[i]
            assert torch.allclose(together.features[i][rows], alone, atol=1e-5)


@each_encoder
def test_gradient_reaches_every_parameter(kind: str) -> None:
    """But the bias of keys: softmax ignores a constant added to every key's score."""
    _, tower, transform = build(kind)
    out = tower(**inputs(transform, [picture(i, size) for i, size in enumerate(SIZES)])[0])
    weights = torch.randn(out.features.shape, generator=torch.Generator().manual_seed(0))
    (out.features * weights).sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith(("k_proj.bias", "key.bias")):
            continue
        grad = parameter.grad
        if name.endswith(("qkv.bias", "in_proj_bias")):
            queries, _, values = grad.chunk(3)
            grad = torch.cat([queries, values])
        assert float(grad.abs().max()) > 1e-6, name


@each_encoder
def test_rows_are_in_row_order(kind: str) -> None:
    """With attention's output projections at zero no patch sees another: brightening one moves its own row only."""
    _, tower, transform = build(kind)
    for name, parameter in tower.named_parameters():
        if any(word in name for word in ("out_proj", "o_proj", "attention.output.dense", "attn.proj")):
            torch.nn.init.zeros_(parameter)
    tensors, grids = inputs(transform, [picture(3, (56, 56))])
    rows, columns = grids[0]
    with torch.no_grad():
        before = tower(**tensors).features[0]
        for row in range(rows):
            for column in range(columns):
                changed = brighter(tensors["pixel_values"], transform, (row, column), columns)
                moved = (tower(**{**tensors, "pixel_values": changed}).features[0] - before).norm(dim=-1)
                assert int(moved.argmax()) == row * columns + column
                assert int((moved > 1e-4).sum()) == 1


@each_encoder
def test_padding_rows_do_not_matter(kind: str) -> None:
    """Where a tower marks padding, its content changes no real row."""
    _, tower, transform = build(kind)
    tensors, _ = inputs(transform, [picture(i, size) for i, size in enumerate([(70, 30), (14, 14 * 11)])])
    with torch.no_grad():
        before = tower(**tensors)
        if before.mask is None:
            assert tensors.keys() == {"pixel_values"}
            return
        mask = torch.nn.functional.pad(tensors["pixel_attention_mask"], (0, 3))
        values = torch.full((2, mask.shape[1], tensors["pixel_values"].shape[2]), 50.0)
        values[mask.bool()] = tensors["pixel_values"][tensors["pixel_attention_mask"].bool()]
        after = tower(**{**tensors, "pixel_values": values, "pixel_attention_mask": mask})
    assert not after.mask.all(1).any()
    assert torch.allclose(after.features[after.mask], before.features[before.mask], atol=1e-5)


@each_encoder
def test_bfloat16(kind: str) -> None:
    _, tower, transform = build(kind)
    tensors, _ = inputs(transform, [picture(1, (56, 56))])
    with torch.no_grad():
        full = tower(**tensors).features
        half = tower.to(torch.bfloat16)(**tensors).features
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().mean() < 0.1 * full.std()


@each_encoder
def test_the_image_transform_is_the_towers_own_and_recorded(kind: str, tmp_path: Path) -> None:
    """`vlm.new` takes the tower's transform, the saved processor holds every number of it, and the sizes agree."""
    module = needs(kind)
    model, processor = tiny(kind)
    config, transform = model.config.vision_config, processor.image_transform
    settings = {"max_num_patches": 16} if transform.any_aspect else {}
    assert transform == module.transform(module.tiny(), **settings)
    assert open_transform(transform.to_dict()) == transform
    processor.save_pretrained(tmp_path)
    assert vlm.Processor.from_pretrained(tmp_path).image_transform == transform
    assert transform.patch_size == config.patch_size
    assert transform.image_size == getattr(config, "image_size", None)


@each_encoder
def test_patches_only(kind: str) -> None:
    """As many rows as `tokens_for` says: class and register tokens are gone, and no patch is."""
    config, tower, transform = build(kind)
    tensors, grids = inputs(transform, [picture(0, (56, 56))])
    features = tower(**tensors).features
    assert features.shape[1] == grids[0][0] * grids[0][1]
    side = getattr(config, "image_size", grids[0][0] * transform.patch_size)
    assert encoder_spec(kind).tokens_for(config, side) == features.shape[1]


def blocks_of(kind: str, tower: torch.nn.Module) -> torch.nn.ModuleList:
    """The tower's blocks, wherever they are."""
    inner: Any = getattr(tower, "trunk", getattr(tower, "visual", tower))
    name = encoder_spec(kind).block_names[0].rstrip(".")
    found: Any = inner.get_submodule(name)
    return found


@each_encoder
@torch.no_grad()
def test_feature_layers(kind: str) -> None:
    """-2 is the output of the last block but one without a norm, a list is concatenated in its order; what hooks see in
    the whole tower says so."""
    config, tower, transform = build(kind)
    module = encoder_spec(kind)
    if not module.block_names and module.choose is None:
        with pytest.raises(ConfigError, match="gives its last layer only"):
            encoder_spec(kind).choose_layers(kind, config, -2)
        return
    tensors, _ = inputs(transform, [picture(i, size) for i, size in enumerate(SIZES)])
    whole = {-1: tower(**tensors).features, -2: last_but_one(kind, tower, tensors)}
    for layers in (-2, [-2, -1], [-1, -2]):
        chosen = encoder_spec(kind).choose_layers(kind, config, layers)
        again = encoder_spec(kind).encoder._from_config(chosen).eval()
        wanted = set(again.state_dict())
        kept = {name: value for name, value in tower.state_dict().items() if name in wanted}
        again.load_state_dict(kept)
        want = torch.cat([whole[layer] for layer in (layers if isinstance(layers, list) else [layers])], -1)
        got = again(**tensors).features
        assert feature_width(chosen) == got.shape[-1] == want.shape[-1]
        # The members of a fused tower each concatenate their own.
        assert torch.allclose(got.sort(-1).values, want.sort(-1).values, atol=1e-5)
        assert kind == "fused" or torch.allclose(got, want, atol=1e-5)
        assert len(kept) < len(tower.state_dict()) or layers != -2


def last_but_one(kind: str, tower: Any, tensors: dict[str, Tensor]) -> Tensor:
    """The patches in the output of the last block but one, seen by a hook."""
    if kind == "fused":
        names = [member for member, _ in tower.config.towers]
        towers = [(name, member) for name, member in zip(names, tower.members, strict=True)]
    else:
        towers = [(kind, tower)]
    seen: list[Tensor] = []
    hooks = [
        blocks_of(name, own)[-2].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        for name, own in towers
    ]
    patches = tower(**tensors).features.shape[1]
    for hook in hooks:
        hook.remove()
    return torch.cat([output[:, -patches:] for output in seen], -1)


def enlarged(kind: str, config: Any) -> Any:
    """The configuration at twice its image size."""
    if kind == "fused":
        towers = [(member, enlarged(member, own)) for member, own in config.towers]
        return fuse(towers)
    return encoder_spec(kind).read_config({**config.to_dict(), "image_size": 2 * config.image_size})


def resampled(kind: str, state: dict[str, Tensor], config: Any) -> tuple[dict[str, Tensor], int]:
    """The weights at the configuration's image size, and how many position tables were resampled."""
    if kind == "fused":
        result: dict[str, Tensor] = {}
        count = 0
        for number, (member, own) in enumerate(config.towers):
            start = f"members.{number}."
            inner = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
            changed, tables = resampled(member, inner, own)
            result |= {start + name: value for name, value in changed.items()}
            count += tables
        return result, count
    module = encoder_spec(kind)
    found = [name for name in module.positions if name in state]
    return {**state, **{name: module.resample(state[name], config) for name in found}}, len(found)


@each_fixed
@torch.no_grad()
def test_another_image_size(kind: str) -> None:
    """The position table is resampled to the new grid and nothing else changes; DINOv3 has angles, and no table (of the
    fused tower's members, one has)."""
    config, tower, _ = build(kind)
    bigger = enlarged(kind, config)
    state, tables = resampled(kind, dict(tower.state_dict()), bigger)
    assert tables == (1 if kind == "fused" or encoder_spec(kind).positions else 0)
    grown = encoder_spec(kind).encoder._from_config(bigger).eval()
    grown.load_state_dict(state)
    transform = encoder_spec(kind).transform(bigger)
    out = grown(**inputs(transform, [picture(0, (80, 60))])[0])
    assert out.grid.tolist() == [[4, 4]] and out.features.isfinite().all()
    assert encoder_spec(kind).tokens_for(bigger, bigger.image_size) == 16
    same, _ = resampled(kind, dict(tower.state_dict()), config)
    assert all(torch.equal(value, same[name]) for name, value in tower.state_dict().items())


@each_encoder
def test_pixels_that_are_never_seen_are_said(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """33 px with patches of 14 px: the last 5 of each side. NaFlex has whole patches of every image."""
    module = needs(kind)
    if kind == "siglip2_naflex":
        transform = choose(module.tiny(), image={"max_num_patches": 12}).transform
        assert caplog.records == [] and "never seen" not in transform.describe()
        for width, height in SIZES:
            rows, columns = transform.grid(height, width)
            assert transform.effective_resolution(height, width) == (rows * 14, columns * 14)
        return
    towers = [own for _, own in module.tiny().towers] if kind == "fused" else [module.tiny()]
    with caplog.at_level(logging.WARNING, "vlm.build.towers"):
        chosen = choose(towers, image_size=33)
    messages = [record.getMessage() for record in caplog.records if "are never seen" in record.getMessage()]
    patches = [own.patch_size for own in towers]
    assert len(messages) == len(towers)
    for message, patch in zip(messages, patches, strict=True):
        assert f"image_size 33 is no multiple of the patch size {patch}: the last {33 % patch} pixels" in message
    assert "never seen" in chosen.transform.describe()


DROPPING: dict[str, dict[str, Any]] = {
    "siglip": {"attention_dropout": 0.5},
    "siglip2_naflex": {"attention_dropout": 0.5},
    "clip": {"attention_dropout": 0.5},
    "dinov2": {"drop_path_rate": 0.5, "hidden_dropout_prob": 0.5},
    "dinov3": {"drop_path_rate": 0.5},
    "timm": {"drop_path_rate": 0.5, "proj_drop_rate": 0.5},
}
"""What turns randomness on while training, by kind; open_clip's towers have none (its patch dropout is taken out)."""


def dropping(kind: str, config: Any) -> Any:
    if kind == "fused":
        return fuse([(member, dropping(member, own)) for member, own in config.towers])
    settings = DROPPING.get(kind, {})
    if kind == "timm":
        args: dict[str, Any] = {"model_args": {**config.model_args, **settings}}
        return encoder_spec(kind).read_config(
            {"architecture": config.architecture, "image_size": config.image_size, **args}
        )
    return encoder_spec(kind).read_config({**config.to_dict(), **settings})


@each_encoder
def test_a_frozen_tower_is_still(kind: str) -> None:
    """Frozen by a stage: no gradient, and neither dropout nor drop-path although the model trains; trained: both."""
    config = dropping(kind, needs(kind).tiny())
    model, processor = tiny(kind)
    tower = model.model.vision_tower = tower_of(kind, config)
    batch = processor([picture(i, size) for i, size in enumerate(SIZES)], ["a"] * 3, ["b"] * 3)
    names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    pixels = {name: batch[name] for name in names if name in batch.keys()}

    def outputs() -> list[Tensor]:
        model.train()
        return [tower(**pixels).features for _ in range(4)]

    stage: dict[str, Any] = {"name": "a", "steps": 1, "batch_size": 1}
    with freezing.frozen(model, StageConfig(**stage, module="frozen_encoder", train={"projector": 1e-3})):
        still = outputs()
        assert all(torch.equal(still[0], other) for other in still)
        model(**batch).loss.backward()
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in tower.parameters())
    with freezing.frozen(model, StageConfig(**stage, module="full", train={"encoder": 1e-3, "projector": 1e-3})):
        moving = outputs()
        if kind in DROPPING or kind == "fused":
            assert not all(torch.equal(moving[0], other) for other in moving)
        assert all(parameter.requires_grad for parameter in tower.parameters())


@each_encoder
def test_tiny_is_tiny(kind: str) -> None:
    module = needs(kind)
    config = module.tiny()
    assert type(config) is module.config and config.to_dict() == module.tiny().to_dict()
    assert sum(p.numel() for p in module.encoder._from_config(config).parameters()) < 100_000
    again = encoder_spec(kind).read_config(config.to_dict())
    assert again.to_dict() == config.to_dict()
