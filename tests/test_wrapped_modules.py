"""Whatever wraps, hooks, quantises, adapts or offloads a module takes part in the forward and in the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from coretools import lay_out, loud, picture, sample, shake
from torch import Tensor, nn
from torch.nn import functional as F

import vlm
from vlm import check
from vlm.build.presets import tiny
from vlm.errors import ConfigError
from vlm.model import loss
from vlm.model.forward import VLM
from vlm.model.parts import encoder_spec
from vlm.registry import kinds

ROWS = [[sample(3, 2, 1)], [sample(5, 9, 2)], [sample(1, 1, 3)]]
OWN_ENCODERS = [kind for kind in kinds("vlm.encoders") if encoder_spec(kind).extra is None]


def model_and_batch(encoder: str = "siglip", decoder: str = "gemma") -> tuple[VLM, dict[str, Tensor]]:
    """A model of one's own to change, and a training batch."""
    found, processor = loud(encoder, decoder)
    batch = processor([picture(1, (60, 30)), picture(2, (20, 90))], ["caption en", "no"], ["a red square", "yes"])
    return copy.deepcopy(found), {name: batch[name] for name in batch.keys()}


def cross_entropy(model: VLM, batch: dict[str, Tensor]) -> Tensor:
    """The definition: the model's own logits, and the labels one place on."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=-100)


class LowRank(nn.Module):
    """A linear layer with a trainable update of rank 2, written here."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(3)
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator))

    def forward(self, hidden: Tensor) -> Tensor:
        assert hidden.ndim == 3
        return self.base(hidden) + hidden @ self.down.T @ self.up.T


class Int8(nn.Module):
    """A linear layer of int8 rows and a scale for each, without a float weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        weight = base.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("rows", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ (self.rows.float() * self.scale).T  # type: ignore[operator]


@pytest.fixture(params=["whole", "in chunks"])
def chunks(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The rows of the loss at once, and two at a time."""
    if request.param == "in chunks":
        monkeypatch.setattr(loss, "CHUNK_BYTES", 2 * 4 * loud("siglip", "gemma")[0].config.text_config.vocab_size)
    return str(request.param)


@pytest.mark.parametrize("decoder", ["gemma", "gemma2"])
def test_an_adapted_output_layer_is_in_the_loss(chunks: str, decoder: str) -> None:
    model, batch = model_and_batch(decoder=decoder)
    model.config.softcap_in_loss = True
    plain = float(model(**batch).loss)
    model.lm_head = LowRank(model.lm_head)
    out = model(**batch)
    wanted = cross_entropy(model, batch)
    assert torch.allclose(out.loss, wanted, rtol=1e-6) and abs(float(wanted) - plain) > 0.05
    ours = torch.autograd.grad(out.loss, list(model.parameters()))
    theirs = torch.autograd.grad(wanted, list(model.parameters()))
    for (name, _), one, two in zip(model.named_parameters(), ours, theirs, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5), name
    assert all(float(grad.abs().max()) > 0 for grad in ours[-2:])  # of `down` and `up`


def test_peft_on_the_output_layer_learns(chunks: str) -> None:
    peft = pytest.importorskip("peft")
    model, batch = model_and_batch()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    value = wrapped(**batch).loss
    wanted = cross_entropy(wrapped, batch)
    assert torch.allclose(value, wanted, rtol=1e-6)
    value.backward()
    grads = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in grads)
    assert all(grad is not None and float(grad.abs().max()) > 0 for grad in grads.values())


def test_hooks_of_the_output_layer_fire(chunks: str) -> None:
    """They see rows of logits, and what they return counts."""
    model, batch = model_and_batch()
    seen: list[tuple[int, ...]] = []

    def double(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        seen.append(tuple(output.shape))
        return output * 2

    model.lm_head.register_forward_hook(double)
    with torch.no_grad():
        value = model(**batch, skip_logits=True).loss
        rows = sum(shape[1] for shape in seen)
        assert rows == int((batch["labels"] != -100).sum())
        assert torch.allclose(value, cross_entropy(model, batch), rtol=1e-6)


@pytest.mark.parametrize("encoder", OWN_ENCODERS)
def test_quantised_matrices(chunks: str, encoder: str) -> None:
    """A head of int8 rows; then every linear layer of the model through torch's dynamic quantisation."""
    model, batch = model_and_batch(encoder)
    with torch.no_grad():
        plain = float(model(**batch).loss)
        one = copy.deepcopy(model)
        one.lm_head = Int8(one.lm_head)
        value = one(**batch).loss
        assert torch.allclose(value, cross_entropy(one, batch), rtol=1e-6)
        assert 0 < abs(float(value) - plain) < 0.3
        two = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        assert not any(isinstance(module, nn.Linear) for module in two.lm_head.modules())
        # Its scale of the activations depends on the rows that pass together.
        assert torch.allclose(two(**batch).loss, cross_entropy(two, batch), rtol=2e-3)


def offloaded_whole(model: VLM, folder: Path) -> None:
    cpu_offload(model)


def offloaded_head(model: VLM, folder: Path) -> None:
    cpu_offload(model.lm_head)


def offloaded_tower(model: VLM, folder: Path) -> None:
    cpu_offload(model.model.vision_tower)
    cpu_offload(model.model.multi_modal_projector)


def on_disk(model: VLM, folder: Path) -> None:
    disk_offload(model, str(folder))


def dispatched(model: VLM, folder: Path) -> None:
    devices: dict[str, Any] = {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu"}
    devices |= {"model.language_model": "disk", "lm_head": "disk"}
    dispatch_model(model, devices, main_device="cpu", offload_dir=str(folder), force_hooks=True)


OFFLOADS = [offloaded_whole, offloaded_head, offloaded_tower, on_disk, dispatched]


@pytest.mark.parametrize("offload", OFFLOADS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("encoder", OWN_ENCODERS)
def test_offloaded_parts(encoder: str, offload: Callable[[VLM, Path], None], tmp_path: Path) -> None:
    """Each call gives the loss of the model in memory, and nothing of it stays in memory in between."""
    model, batch = model_and_batch(encoder)
    with torch.no_grad():
        wanted = model(**batch).loss
    offload(model, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        for _ in range(3):
            assert torch.allclose(model(**batch).loss, wanted, rtol=1e-6)
    assert torch.allclose(model(**batch).loss, wanted, rtol=1e-6)  # with gradients recorded
    assert any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("encoder", ["siglip", "siglip2_naflex"])
def test_adapted_position_table(encoder: str) -> None:
    """A wrapper of the table's module is part of the features, and learns; so does the patch embedding's."""
    model, batch = model_and_batch(encoder)

    class Shifted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            # Not the same for all channels: layer norms would take that out again.
            self.base, self.shift = base, nn.Parameter(torch.linspace(-1, 1, 32))

        def forward(self, given: Tensor) -> Tensor:
            return self.base(given) + self.shift

    names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    pixels = {name: batch[name] for name in names if name in batch}
    embeddings: Any = model.model.vision_tower.embeddings
    embeddings.position_embedding = Shifted(embeddings.position_embedding)
    model(**batch).loss.backward()
    shift = embeddings.position_embedding.shift
    assert float(shift.grad.abs().max()) > 0
    with torch.no_grad():
        wrapped = model.encode(**pixels).features
        # The same as a table whose rows are all larger by the shift.
        embeddings.position_embedding = embeddings.position_embedding.base
        before = model.encode(**pixels).features
        embeddings.position_embedding.weight += shift
        assert torch.allclose(model.encode(**pixels).features, wrapped, atol=1e-5)
    assert not torch.allclose(before, wrapped, atol=1e-2)


class Wrapped(nn.Module):
    """A module behind another one, which has nothing of its own: no weight, no dtype."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: Any, **named: Any) -> Any:
        return self.inner(*given, **named)


@pytest.mark.parametrize("encoder", OWN_ENCODERS)
def test_every_layer_may_be_wrapped(encoder: str) -> None:
    """All linear layers, convolutions and embeddings of the model behind wrappers: the same loss and the same text."""
    model, batch = model_and_batch(encoder)
    _, processor = loud(encoder, "gemma")
    prompt: Any = processor, picture(1, (60, 30)), "caption en"
    with torch.no_grad():
        wanted, text = model(**batch).loss, vlm.generate(model, *prompt, max_new_tokens=4)
        layers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)]
        for name in layers:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Wrapped(model.get_submodule(name)))
        assert torch.equal(model(**batch).loss, wanted)
        assert vlm.generate(model, *prompt, max_new_tokens=4) == text
        again = copy.deepcopy(model)
        model.get_submodule(layers[0]).inner = nn.Identity()  # a copy runs its own modules
        assert torch.equal(again(**batch).loss, wanted)


def test_checks_pass_over_adapted_embeddings() -> None:
    model, processor = loud("siglip", "gemma")
    both = ("tied-weights", "embedding-scale")
    for changed, rows in ((copy.deepcopy(model), both[:1]), (copy.deepcopy(model), both)):
        if rows == both:
            changed.set_input_embeddings(Wrapped(changed.get_input_embeddings()))
        else:
            changed.lm_head = LowRank(changed.lm_head)
        found = check.run(changed, processor, only=rows)
        assert all(found[name].status == "n/a" and "adapts or quantises" in found[name].detail for name in rows)


def test_tied_embeddings_learn_from_both_ends() -> None:
    """The gradient of the tied table is the sum of those of an untied copy."""
    model, batch = model_and_batch()
    apart = copy.deepcopy(model)
    apart.lm_head.weight = nn.Parameter(apart.lm_head.weight.detach().clone())
    model(**batch).loss.backward()
    apart(**batch).loss.backward()
    table = apart.model.language_model.embed_tokens.weight.grad
    both = apart.lm_head.weight.grad + table
    assert torch.allclose(model.lm_head.weight.grad, both, atol=1e-6)
    assert float(table.abs().max()) > 0 and float(apart.lm_head.weight.grad.abs().max()) > 0


def test_offloaded_model_opens_and_writes(tmp_path: Path) -> None:
    """`vlm.load` with parts on the disk: the same text and loss as in memory."""
    model, processor = tiny("siglip2_naflex")
    shake(model)
    vlm.save(model, processor, tmp_path / "m")
    there = {"model.vision_tower": "disk", "model.multi_modal_projector": "disk", "model.language_model": "disk"}
    one, _ = vlm.load(tmp_path / "m")
    two, _ = vlm.load(tmp_path / "m", device_map={**there, "lm_head": "disk"}, offload_folder=tmp_path / "parts")
    batch = processor([picture(1)], ["caption en"], ["a red square"])
    with torch.no_grad():
        assert torch.allclose(one(**batch).loss, two(**batch).loss, rtol=1e-6)
    texts = [vlm.generate(m, processor, picture(1), "caption en", max_new_tokens=5) for m in (one, two)]
    assert texts[0] == texts[1]


def test_a_layer_without_its_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs vocabulary or chunk_rows"):
        loss.linear_cross_entropy(torch.zeros(2, 4), nn.Linear(4, 9), torch.zeros(2).long(), torch.ones(2))
    assert lay_out(loud("siglip", "gemma")[0], ROWS)["input_ids"].shape[0] == 3
