"""What each decoder's file says of it, held against transformers; and that nobody else asks a decoder what it is."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from coretools import loud

from vlm.build.presets import tiny, tiny_decoder
from vlm.decoders.contract import SLIDING
from vlm.errors import ConfigError, GenerationError
from vlm.model import decoder
from vlm.registry import kinds
from vlm.text.prompts import PromptEncoder

ROOT = Path(__file__).resolve().parents[1]
KINDS = kinds("vlm.decoders")
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_the_file_name_is_transformers_model_type(kind: str) -> None:
    spec = decoder.named(kind)
    assert spec.config.model_type == kind and spec.model.config_class is spec.config
    assert decoder.spec(tiny_decoder(kind)) is spec


@each_kind
def test_blocks_are_those_that_the_model_is_made_of(kind: str) -> None:
    model: Any = decoder.build(tiny_decoder(kind))
    assert {type(layer).__name__ for layer in model.layers} == set(decoder.named(kind).blocks)
    assert set(decoder.named(kind).blocks) <= set(model._no_split_modules)
    whole: Any = tiny("siglip", kind)[0]
    assert set(decoder.named(kind).blocks) <= set(whole._no_split_modules)


@each_kind
def test_facts_are_those_of_the_layers(kind: str) -> None:
    config = tiny_decoder(kind)
    model: Any = decoder.build(config)
    facts = decoder.facts(config)
    ids = torch.tensor([[3, 1]])
    table = model.get_input_embeddings()
    torch.testing.assert_close(table(ids), torch.nn.functional.embedding(ids, table.weight) * facts.embedding_scale)
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in model.layers]
    assert windows == [facts.window if type_ == SLIDING else None for type_ in facts.layer_types]
    caps = {getattr(layer.self_attn, "attn_logit_softcapping", None) for layer in model.layers}
    assert caps == {facts.attention_softcap}
    assert facts.context == model.config.max_position_embeddings == 512


@each_kind
def test_without_its_window_all_layers_are_full(kind: str) -> None:
    config = tiny_decoder(kind)
    model: Any = decoder.build(config)
    decoder.named(kind).drop_window(config, model)
    assert not decoder.facts(config).windowed
    assert all(getattr(layer.self_attn, "sliding_window", None) is None for layer in model.layers)


@each_kind
def test_the_tokens_around_a_prompt(kind: str) -> None:
    tokenizer = loud("siglip", kind)[1].tokenizer
    spec, encoded = decoder.named(kind), PromptEncoder(tokenizer)("a", "b", sample="0")
    assert tokenizer.convert_ids_to_tokens([encoded.prefix[0], encoded.suffix[-1]]) == [spec.bos, spec.eos]
    assert tokenizer.decode(encoded.prefix[-1:]) == spec.separator


@pytest.mark.parametrize("kind", [kind for kind in KINDS if decoder.named(kind).final_softcap_setting])
def test_final_softcap_off_and_on_again(kind: str) -> None:
    config = tiny_decoder(kind, final_logit_softcapping=7.0)
    assert decoder.facts(config).final_softcap == 7.0
    with pytest.raises(ZeroDivisionError), decoder.without_final_softcap(config):
        assert decoder.facts(config).final_softcap is None
        raise ZeroDivisionError
    assert decoder.facts(config).final_softcap == 7.0


def test_what_is_no_decoder_of_ours() -> None:
    with pytest.raises(ConfigError, match=f"model_type is 'llama', expected one of {', '.join(KINDS)}; write"):
        decoder.read_config({"model_type": "llama"})
    with pytest.raises(ConfigError, match="is a LlamaConfig, expected one of GemmaConfig, Gemma2Config, Gemma3TextCon"):
        decoder.read_config(transformers.LlamaConfig())
    with pytest.raises(ConfigError, match="unknown decoder 'gema' .did you mean 'gemma'"):
        decoder.small("gema")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if decoder.named(kind).overflows_float16])
def test_every_gemma_refuses_float16(kind: str, tmp_path: Path) -> None:
    import vlm

    model, processor = tiny("siglip", kind)
    vlm.save(model, processor, tmp_path / "m")
    with pytest.raises(GenerationError, match=f"float16 overflows in {kind} decoders"):
        vlm.load(tmp_path / "m", dtype="float16")


# --- nobody else asks -------------------------------------------------------------------------------------------------

MAKES_ONE = {"vlm/demo/pretrain.py"}
"""Trains a language model of its own, before there is a model of ours."""
PART = re.compile(r"\b(text_config|language_model)\b")
TYPE = re.compile(r"\b(text_config|text|decoder)\.model_type$")


def asked(source: str) -> list[str]:
    """Places that ask a decoder what it is, as written."""
    found = []
    for node in ast.walk(ast.parse(source)):
        written = ast.unparse(node) if isinstance(node, ast.expr | ast.ImportFrom) else ""
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
            classes = [alias.name for alias in node.names if re.match(r"Gemma\d*(Text)?(Config|Model|For)", alias.name)]
            found += [written] if classes else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "getattr", "isinstance"):
            optional = ast.unparse(node.func) != "getattr" or len(node.args) == 3
            found += [written] if optional and PART.search(ast.unparse(node.args[0])) else []
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            constants = {c.value for side in sides for c in ast.walk(side) if isinstance(c, ast.Constant)}
            kind = constants & {*KINDS, "full_attention", "sliding_attention"}
            typed = any(TYPE.search(ast.unparse(side)) for side in sides)
            found += [written] if kind or typed else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".startswith"):
            found += [written] if "gemma" in ast.unparse(node) else []
        elif isinstance(node, ast.Subscript):
            found += [written] if TYPE.search(ast.unparse(node.slice)) else []
    return found


@pytest.mark.parametrize(
    "code",
    [
        "from transformers import Gemma2Config",
        "isinstance(config.text_config, Whatever)",
        "getattr(model.config.text_config, 'sliding_window', None)",
        "hasattr(self.model.language_model, 'layers')",
        "kind in ('gemma', 'gemma2')",
        "config.text_config.model_type != other",
        "'sliding_attention' in types",
        "str(kind).startswith('gemma')",
        "TABLE[text.model_type]",
    ],
)
def test_the_reader_finds_a_question(code: str) -> None:
    assert asked(code)


def test_nobody_outside_the_room_asks_a_decoder_what_it_is() -> None:
    found: dict[str, Any] = {}
    for path in sorted((ROOT / "vlm").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("vlm/decoders/") and name not in MAKES_ONE:
            found[name] = asked(path.read_text(encoding="utf-8"))
    assert len(found) > 100 and {name: places for name, places in found.items() if places} == {}
