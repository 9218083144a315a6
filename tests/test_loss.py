"""The loss against F.cross_entropy on full logits; reductions, chunks, accumulation, and what is never computed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from coretools import Sample, lay_out, loud, sample, some_ids
from torch import Tensor
from torch.nn import functional as F

from vlm.errors import ConfigError, DataError
from vlm.model import loss
from vlm.model.config import VLMConfig
from vlm.model.forward import VLM

# Suffixes of very different length: the two reductions differ.
ROWS = [[sample(3, 2, 1)], [sample(5, 9, 2)], [sample(1, 1, 3)], [sample(4, 5, 4)]]
each_reduction = pytest.mark.parametrize("reduction", ["token", "example"])


def reference(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """The definition: full logits, shifted labels, a mean over tokens or over examples of their means."""
    if reduction == "token":
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
    each = [
        F.cross_entropy(row[:-1].float(), target[1:], ignore_index=-100)
        for row, target in zip(logits, labels, strict=True)
    ]
    return torch.stack(each).mean()


def without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def gradients(model: VLM, value: Tensor) -> dict[str, Tensor]:
    """Gradients of every parameter, and clears them."""
    model.zero_grad()
    value.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@each_reduction
@pytest.mark.parametrize("side", ["right", "left"])
def test_model_loss_is_cross_entropy_on_full_logits(reduction: Any, side: str) -> None:
    model, _ = loud("siglip", "gemma")
    batch = lay_out(model, ROWS, side, labels=True)
    out = model(**batch, reduction=reduction)
    logits = model(**without_labels(batch)).logits
    wanted = reference(logits, batch["labels"], reduction)
    assert torch.allclose(out.loss, wanted, rtol=1e-6)
    weight = {"token": 17.0, "example": 4.0}[reduction]
    assert float(out.loss_weight) == weight
    assert torch.allclose(out.loss_sum, wanted * weight, rtol=1e-6)
    ours, theirs = gradients(model, out.loss), gradients(model, wanted)
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    for name, grad in ours.items():
        assert torch.allclose(grad, theirs[name], atol=1e-6), name
    one, two = (reference(logits.detach(), batch["labels"], name) for name in ("token", "example"))
    assert abs(float(one - two)) > 1e-3


@each_reduction
def test_packed_examples_are_examples(reduction: Any) -> None:
    """`example` averages over packed samples, not over rows."""
    model, _ = loud("siglip", "gemma")
    packed = [[ROWS[0][0], ROWS[1][0]], [ROWS[2][0], ROWS[3][0]]]
    apart = model(**lay_out(model, ROWS, labels=True), reduction=reduction)
    together = model(**lay_out(model, packed, labels=True), reduction=reduction)
    assert torch.equal(apart.loss_weight, together.loss_weight)
    assert torch.allclose(apart.loss, together.loss, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_rows", [1, 4, 16, 17, 100])
def test_chunks_change_neither_value_nor_gradient(chunk_rows: int, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(17, 8, generator=generator, dtype=torch.float64) * 2
    head = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 50, (17,), generator=generator)
    weight = torch.rand(17, generator=generator)
    results = []
    for rows in (None, chunk_rows):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        value = loss.linear_cross_entropy(h, w, target, weight, softcap=softcap, chunk_rows=rows)
        value.backward()
        results.append((value.detach(), h.grad, w.grad))
    logits = hidden @ head.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = (F.cross_entropy(logits, target, reduction="none") * weight).sum()
    assert torch.allclose(results[0][0].double(), wanted, rtol=1e-6)
    for one, two in zip(*results, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)


def test_largest_chunk_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more rows than fit the byte limit reach the vocabulary at once, and only supervised rows do."""
    seen: list[int] = []
    linear = F.linear

    def spy(hidden: Tensor, head: Tensor) -> Tensor:
        seen.append(hidden.shape[0])
        return linear(hidden, head)

    monkeypatch.setattr(loss.F, "linear", spy)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 5 * 4 * 50)
    value = loss.linear_cross_entropy(torch.zeros(17, 8), torch.zeros(50, 8), torch.zeros(17).long(), torch.ones(17))
    assert seen == [5, 5, 5, 2]
    assert math.isclose(float(value), 17 * math.log(50), rel_tol=1e-5)


def test_full_logits_never_exist_in_training() -> None:
    """The output layer sees the supervised rows only, and no tensor of the step has a row of logits for each
    position."""
    model, _ = loud("siglip", "gemma")
    batch = lay_out(model, ROWS, labels=True)
    positions = batch["input_ids"].numel()
    called: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda _, inputs, output: called.append(output.shape[:-1].numel()))
    saved: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = model(**batch)
        assert called == [17] and out.logits is None
        model(**without_labels(batch))
        assert called == [17, positions]
    finally:
        handle.remove()
    vocabulary = model.config.text_config.vocab_size
    head = (model.config.text_config.hidden_size, vocabulary)  # the output embedding itself, transposed
    rows = [math.prod(shape[:-1]) for shape in saved if shape and shape[-1] == vocabulary and shape != head]
    assert rows and max(rows) == 17 < positions


@each_reduction
def test_accumulation_equals_one_batch(reduction: Any) -> None:
    """1 batch of 4 = 2 x 2 when the sums are divided by the global weight; a mean of means would differ."""
    model, _ = loud("siglip", "gemma")
    whole = model(**lay_out(model, ROWS, labels=True), reduction=reduction)
    wanted = gradients(model, whole.loss)
    halves = [model(**lay_out(model, ROWS[i : i + 2], labels=True), reduction=reduction) for i in (0, 2)]
    weight = sum(half.loss_weight for half in halves)
    got = gradients(model, sum(half.loss_sum / weight for half in halves))
    for name, grad in wanted.items():
        assert torch.allclose(got[name], grad, atol=1e-6), name
    if reduction == "token":
        mean_of_means = (halves[0].loss + halves[1].loss) / 2
        assert abs(float(mean_of_means.detach() - whole.loss.detach())) > 1e-3


def test_softcap_in_loss_is_a_choice() -> None:
    """Off: training ignores the cap, as the original recipe does; on: the loss is that of the capped logits."""
    model, _ = loud("siglip", "gemma2", sliding_window=8, final_logit_softcapping=0.5)
    batch = lay_out(model, ROWS, labels=True)
    capped = model(**without_labels(batch)).logits
    free = 0.5 * torch.atanh((capped / 0.5).double())
    assert capped.abs().max() < 0.5
    assert torch.allclose(model(**batch).loss.double(), reference(free, batch["labels"], "token").double(), rtol=1e-3)
    try:
        model.config.softcap_in_loss = True
        assert torch.allclose(model(**batch).loss, reference(capped, batch["labels"], "token"), rtol=1e-6)
    finally:
        model.config.softcap_in_loss = False
    one, two = (reference(logits.detach(), batch["labels"], "token") for logits in (capped, free))
    assert abs(float(one - two)) > 0.01


def test_supervised_rows_by_hand() -> None:
    labels = torch.tensor([[-100, 7, 8, -100], [-100, -100, -100, 9]])
    rows = loss.supervised_rows(labels)
    assert rows.batch.tolist() == [0, 0, 1] and rows.position.tolist() == [0, 1, 2]
    assert rows.target.tolist() == [7, 8, 9] and rows.weight.tolist() == [1, 1, 1] and float(rows.total) == 3
    rows = loss.supervised_rows(labels, reduction="example")
    assert rows.weight.tolist() == [0.5, 0.5, 1] and float(rows.total) == 2
    sequences = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    rows = loss.supervised_rows(labels, sequences, "example")
    assert rows.weight.tolist() == [1, 1, 1] and float(rows.total) == 3


def test_errors() -> None:
    with pytest.raises(ConfigError, match="did you mean 'token'"):
        loss.supervised_rows(torch.zeros(1, 2).long(), reduction="tokens")  # type: ignore[arg-type]
    model, _ = loud("siglip", "gemma")
    batch = lay_out(model, ROWS, labels=True)
    with pytest.raises(DataError, match="labels without token_type_ids"):
        model(**{name: value for name, value in batch.items() if name != "token_type_ids"})
    with pytest.raises(DataError, match="no token of this batch is supervised"):
        model(**{**batch, "labels": torch.full_like(batch["labels"], -100)})


def test_gradient_of_frozen_decoder_reaches_the_projector() -> None:
    """Also with activation checkpointing, where nothing before the projector needs a gradient."""
    from vlm.build.presets import tiny

    wanted: dict[str, Tensor] = {}
    for checkpointing in (False, True):
        model, _ = tiny(seed=1)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("projector" in name)
        if checkpointing:
            # renamed in transformers 5.2x
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()
        batch = lay_out(model, [[Sample(some_ids(3, 1), some_ids(4, 2), 1)]], labels=True)
        got = gradients(model, model(**batch).loss)
        assert set(got) == {"model.multi_modal_projector.linear.weight", "model.multi_modal_projector.linear.bias"}
        assert all(float(grad.abs().max()) > 0 for grad in got.values())
        wanted = wanted or got
        for name, grad in got.items():
            assert torch.allclose(grad, wanted[name], atol=1e-7)


def test_default_of_the_cap_is_off() -> None:
    assert VLMConfig().softcap_in_loss is False
