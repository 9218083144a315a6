"""Encoders are asked for what they are in one way: the `Spec` of their file. No code outside their room tests a part by
name, image mode, `model_type`, class name or attribute."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from coretools import picture
from encodertools import ENCODERS, build, each_encoder, inputs, needs

from vlm.build.presets import tiny
from vlm.encoders.contract import Spec
from vlm.errors import ConfigError
from vlm.images.transforms import Mode
from vlm.model.parts import blocks, encoder_spec, kind_of, known_encoders, model_types, text_towers, towers
from vlm.registry import kinds

ROOT = Path(__file__).resolve().parent.parent
OWN_ROOMS = ("encoders", "projectors", "decoders")
"""A part may look at itself; what it is made of is another library's."""

# --- the tree ---------------------------------------------------------------------------------------------------------

PART_NAMES = {"config", "vision", "vision_config", "text_config", "tower", "vision_tower", "encoder", "decoder"}
PART_NAMES |= {"projector", "spec", "transform", "image_transform", "language_model"}
"""What code calls a part, its configuration or its image transform."""
ATTRIBUTES = {"mode", "model_type", "encoder", "kind"}
COMPARED = {
    ("vlm.checkpoints.configs", "vision.get('model_type', 'siglip_vision_model') != 'siglip_vision_model'"): (
        "a field of a PaliGemma file, whose format names one tower"
    ),
    ("vlm.ranks", "kind.__name__ == 'DistError'"): "an error of torch, which one of its builds does not have",
    ("vlm.cli.commands.demo", "options.encoder != 'siglip'"): "an option that has not its default",
    ("vlm.demo.run", "encoder == 'siglip'"): "the SigLIP with both towers goes on from the demo's own",
    ("vlm.demo.prepare", "'siglip' in encoders"): "the demo's own SigLIP is among the towers asked for",
    ("vlm.demo.towers", "kind != 'siglip'"): "the model that the demo pretrains is a SigLIP already",
    ("vlm.demo.towers", "kind == 'siglip'"): "the model that the demo pretrains is a SigLIP already",
}
"""(module, comparison) -> why it may name an encoder."""
ASKED: dict[tuple[str, str], str] = {}
"""(module, hasattr or getattr with a default) -> why it may ask a part for an attribute."""


def modules() -> Iterator[tuple[str, str, ast.Module]]:
    """(name, room, tree) of every file of the package outside the rooms of parts."""
    for path in sorted((ROOT / "vlm").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        room = parts[1] if len(parts) > 2 else ""
        if room not in OWN_ROOMS:
            name = ".".join(parts).removesuffix(".__init__")
            yield name, room, ast.parse(path.read_text(encoding="utf-8"))


def names_in(node: ast.AST) -> set[str]:
    """Every identifier of an expression, attributes too."""
    found = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    return found | {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}


def strings_in(node: ast.AST) -> set[str]:
    """Strings that stand in an expression themselves, or in a tuple, list or set of it."""
    found = ast.walk(node)
    return {inner.value for inner in found if isinstance(inner, ast.Constant) and isinstance(inner.value, str)}


def asked(tree: ast.Module) -> set[str]:
    """`hasattr` and `getattr` with a default on something that is called like a part."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            asks = node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
            if asks and names_in(node.args[0]) & PART_NAMES:
                found.add(ast.unparse(node))
    return found


def compared(tree: ast.Module, words: set[str], modes: set[str]) -> set[str]:
    """Comparisons with an encoder's kind or `model_type`, with an image mode, or of a class's or module's name."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        strings = set().union(*map(strings_in, sides))
        of_attributes = any(isinstance(side, ast.Attribute) and side.attr in ATTRIBUTES for side in sides)
        class_name = any(isinstance(side, ast.Attribute) and side.attr == "__name__" for side in sides)
        if strings & words or (of_attributes and strings & modes) or class_name:
            found.add(ast.unparse(node))
    return found


def words() -> set[str]:
    """What an encoder is called: its kind, and the `model_type`s that it reads."""
    return {*kinds("vlm.encoders"), *model_types()}


def test_the_reader_finds_what_it_looks_for() -> None:
    tree = ast.parse(
        "a = kind == 'siglip'\nb = transform.mode != 'naflex'\nc = hasattr(model.config, 'towers')\n"
        "d = getattr(tower, 'x', None)\ne = type(tower).__name__ == 'X'\nf = x in ('clip', 'y')\n"
        "g = getattr(os, 'fork', None)\nh = mode == 'naflex'\ni = config.image_size == 3\n"
    )
    assert asked(tree) == {"hasattr(model.config, 'towers')", "getattr(tower, 'x', None)"}
    assert compared(tree, words(), set(get_args(Mode))) == {
        "kind == 'siglip'",
        "transform.mode != 'naflex'",
        "type(tower).__name__ == 'X'",
        "x in ('clip', 'y')",
    }


def test_no_part_is_asked_for_an_attribute() -> None:
    assert {(name, call) for name, _, tree in modules() for call in asked(tree)} == set(ASKED)


def test_no_encoder_is_asked_by_name_or_mode() -> None:
    known, modes = words(), set(get_args(Mode))
    found = {
        (name, text)
        for name, room, tree in modules()
        for text in compared(tree, known, set() if room == "images" else modes)
    }
    assert found == set(COMPARED)


# --- the files --------------------------------------------------------------------------------------------------------


@each_encoder
def test_a_file_shows_its_spec_and_nothing_else(kind: str) -> None:
    module = import_module(f"vlm.encoders.{kind}")
    assert module.__all__ == ["SPEC"] and encoder_spec(kind) is module.SPEC
    spec = module.SPEC
    assert type(spec) is Spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(spec, "title", "another")  # noqa: B010
    assert spec.title and all(type(name) is str for name in (*spec.model_types, *spec.prefixes, *spec.blocks))
    assert spec.encoder.config_class is spec.config or issubclass(spec.config, spec.encoder.config_class)


def test_a_spec_needs_seven_facts_and_the_rest_has_defaults() -> None:
    fields = dataclasses.fields(Spec)
    missing = dataclasses.MISSING
    needed = [field.name for field in fields if field.default is missing and field.default_factory is missing]
    assert needed == ["title", "config", "encoder", "transform", "model_types", "prefixes", "left_out"]
    facts: dict[str, Any] = {name: getattr(encoder_spec("siglip"), name) for name in needed}
    with pytest.raises(ConfigError, match="no configuration that is small enough"):
        Spec(**facts).tiny()
    with pytest.raises(TypeError, match="left_out"):
        Spec(**{name: value for name, value in facts.items() if name != "left_out"})


def tokens_seen(block: Any, tower: Any, tensors: dict[str, torch.Tensor]) -> tuple[int, int]:
    """(patches of an image, tokens that a block gets of it)."""
    seen: list[torch.Size] = []
    handle = block.register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape))
    features = tower(**tensors).features
    handle.remove()
    return features.shape[1], seen[0][-2]


@each_encoder
@torch.no_grad()
def test_blocks_and_extra_tokens_are_the_towers(kind: str) -> None:
    """Classes that are kept whole are there, each inside no other; the blocks see so many tokens beside the patches."""
    config, tower, transform = build(kind)
    members: Any = tower.members if kind == "fused" else [tower]
    for number, (own, member) in enumerate(towers(kind, config)):
        spec = encoder_spec(own)
        part = members[number]
        whole = [module for module in part.modules() if type(module).__name__ in spec.blocks]
        assert len(whole) == member.num_hidden_layers, own
        assert not any(inner in whole for block in whole for inner in list(block.modules())[1:])
        patches, seen = tokens_seen(whole[0], tower, inputs(transform, [picture(0, (56, 56))])[0])
        assert seen == patches + spec.extra_tokens(member), own
    assert set(blocks(kind, config)) == {name for own, _ in towers(kind, config) for name in encoder_spec(own).blocks}


@each_encoder
def test_a_model_keeps_the_blocks_of_its_own_parts_whole(kind: str) -> None:
    needs(kind)
    model, _ = tiny(kind)
    config = model.config
    assert set(blocks(kind, config.vision_config)) <= set(model._no_split_modules or ())
    assert kind_of(model.model.vision_tower) == kind
    spec = encoder_spec(kind)
    assert spec.width(config.vision_config) == model.model.multi_modal_projector.linear.in_features
    assert spec.image_size(config.vision_config) == (None if spec.any_aspect else config.vision_config.image_size)


def test_kinds_and_model_types() -> None:
    assert list(known_encoders()) == ENCODERS
    assert model_types()["siglip2_vision_model"] == "siglip2_naflex" and model_types()["dinov2"] == "dinov2"
    with pytest.raises(ConfigError, match="a Linear is no encoder of this library"):
        kind_of(torch.nn.Linear(1, 1))


def test_text_towers_are_those_of_siglip_and_clip() -> None:
    found = {kind: tower.model_type for kind, tower in text_towers().items()}
    assert found == {"clip": "clip", "siglip": "siglip", "siglip2_naflex": "siglip2"}
    for tower in text_towers().values():
        assert tower.config.model_type == tower.model_type and tower.model.config_class is tower.config
