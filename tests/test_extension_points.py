"""Each extension point takes one more from outside, with one new file and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from coretools import loud, shake
from PIL import Image
from transformers import Qwen2ForCausalLM

import vlm
import vlm.check.checks
import vlm.decoders
import vlm.projectors
from vlm import check
from vlm.build.presets import tiny
from vlm.check import runner
from vlm.errors import ConfigError
from vlm.model import decoder
from vlm.registry import kinds

A_CHECK = """
from vlm.check.report import Finding
from vlm.check.subject import Check, Subject


def finite(subject: Subject) -> Finding:
    wrong = sum(int((~weight.isfinite()).sum()) for weight in subject.model.parameters())
    return Finding(measured=wrong, limit=0, detail="weights that are NaN or infinite")


CHECKS = (Check("finite", "every weight is a number", finite, runs_tower=False),)
"""


def test_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "finite.py").write_text(A_CHECK)
    monkeypatch.setattr(vlm.check.checks, "__path__", [*vlm.check.checks.__path__, str(tmp_path)])
    known = [entry.name for entry in runner.CHECKS]
    monkeypatch.setattr(runner, "CHECKS", runner.find())
    assert [entry.name for entry in runner.CHECKS] == [*known, "finite"]
    model, processor = tiny("siglip", "gemma")
    assert check.run(model, processor, only=["finite"])["finite"].status == "ok"
    with torch.no_grad():
        next(model.parameters()).view(-1)[:3] = torch.nan
    result = check.run(model, processor, only=["finite", "tied-weights"])["finite"]
    assert result.status == "FAIL" and result.measured == 3


# Causal, without soft-caps, windows or a scaled embedding: nothing that Gemma has.
A_DECODER = """
from transformers import Qwen2Config, Qwen2Model

from vlm.decoders.contract import FULL, SMALL, Facts, Spec

SPEC = Spec(
    title="Qwen 2",
    config=Qwen2Config,
    model=Qwen2Model,
    blocks=("Qwen2DecoderLayer",),
    facts=lambda config: Facts(
        embedding_scale=1.0,
        layer_types=(FULL,) * config.num_hidden_layers,
        context=config.max_position_embeddings,
        bidirectional_prefix=False,
    ),
    small={**SMALL, "tie_word_embeddings": True},
    overflows_float16=False,
)
"""


def test_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(decoder.named.cache_clear)
    with pytest.raises(ConfigError, match="unknown decoder 'qwen2'; known: gemma, gemma2, gemma3_text"):
        tiny("siglip", "qwen2")
    (tmp_path / "qwen2.py").write_text(A_DECODER)
    monkeypatch.setattr(vlm.decoders, "__path__", [*vlm.decoders.__path__, str(tmp_path)])
    model, processor = tiny("siglip", "qwen2")
    assert "Qwen2DecoderLayer" in (model._no_split_modules or [])
    shake(model)
    picture = Image.new("RGB", (28, 28), (200, 30, 30))

    # Without a picture it is transformers' own language model, with the labels shifted there.
    batch = processor(text=["caption en", "is it red?"], suffix=["a red square", "yes"])
    ours = model.eval()(**batch, skip_logits=False)
    theirs = Qwen2ForCausalLM(model.config.text_config).eval()
    theirs.load_state_dict(
        {
            **{f"model.{name}": tensor for name, tensor in model.model.language_model.state_dict().items()},
            "lm_head.weight": model.lm_head.weight,
        }
    )
    plain = theirs(**{name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", "labels")})
    real = batch.attention_mask.bool()
    torch.testing.assert_close(ours.logits[real], plain.logits[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.loss, plain.loss)

    # Causal: what follows changes nothing before it, though all of it is prefix. Gemma's prefix sees both ways.
    for net, unchanged in ((model, True), (loud("siglip", "gemma")[0], False)):
        batch = processor([picture], ["caption en"])
        before = net(**batch).logits[:, :-3]
        batch.input_ids[:, -2] = 5
        assert torch.equal(net(**batch).logits[:, :-3], before) == unchanged

    # It is saved, opened and asked like any other, in float16 too, which Gemma refuses.
    vlm.save(model, processor, tmp_path / "model")
    again, reader = vlm.load(tmp_path / "model", attn_implementation="eager")
    assert vlm.generate(again, reader, [picture], ["caption en"], max_new_tokens=4) == vlm.generate(
        model, processor, [picture], ["caption en"], max_new_tokens=4
    )
    assert vlm.load(tmp_path / "model", dtype="float16")[0].dtype == torch.float16


A_PROJECTOR = """
from dataclasses import dataclass

import torch
from torch import nn

from vlm.projectors.contract import Spec


@dataclass(frozen=True, kw_only=True)
class Config:
    scale: float = 1.0


class Mean(nn.Module):
    def __init__(self, config, encoder_width, decoder_width):
        super().__init__()
        self.config, self.linear = config, nn.Linear(encoder_width, decoder_width, bias=False)

    def init_weights(self):
        nn.init.ones_(self.linear.weight)

    def num_tokens(self, grid):
        return 1

    def flops(self, grid):
        return 2 * self.linear.weight.numel()

    def forward(self, features, mask, grid):
        return self.config.scale * self.linear(features.mean(1, keepdim=True)), None


SPEC = Spec(config=Config, build=Mean, num_tokens=lambda config, grid: 1)
"""


def test_a_projector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mean.py").write_text(A_PROJECTOR)
    monkeypatch.setattr(vlm.projectors, "__path__", [*vlm.projectors.__path__, str(tmp_path)])
    assert "mean" in kinds("vlm.projectors") and "contract" not in kinds("vlm.projectors")
    model, processor = tiny("siglip", "gemma", {"kind": "mean", "scale": 2.0})
    batch = processor([Image.new("RGB", (28, 28), (200, 30, 30))], ["caption en"], ["a red square"])
    assert int((batch.input_ids == processor.image_token_id).sum()) == 1
    assert batch.pixel_values is not None
    features = model.encode(batch.pixel_values).features
    seen = model(**batch).image_hidden_states  # ones for weights: the sum over the channels of the mean patch
    torch.testing.assert_close(seen, (2 * features.mean(1).sum(-1, keepdim=True)).expand_as(seen))
    vlm.save(model, processor, tmp_path / "model")
    again, _ = vlm.load(tmp_path / "model")
    torch.testing.assert_close(again(**batch).loss, model(**batch).loss, rtol=0, atol=0)
