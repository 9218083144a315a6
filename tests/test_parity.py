"""The same weights in transformers' PaliGemmaForConditionalGeneration give the same logits, loss and greedy ids.

transformers needs care to be right (see the comments): it gets `token_type_ids`, and for Gemma 2 eager attention,
because 5.17's sdpa drops the soft-cap."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from coretools import lay_out, loud, sample
from torch.nn import functional as F
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from vlm.model.forward import VLM
from vlm.model.loss import apply_softcap

ROWS = [[sample(5, 6, 1)], [sample(9, 2, 2)], [sample(2, 9, 3)]]
# window 8 is shorter than the sequences, 4096 longer
CASES = [("gemma", None), ("gemma2", 4096), ("gemma2", 8)]


def twin(model: VLM) -> PaliGemmaForConditionalGeneration:
    """transformers' PaliGemma with the very same tensors."""
    config = model.config
    assert config.image_token_id is not None
    theirs = PaliGemmaForConditionalGeneration._from_config(
        PaliGemmaConfig(
            vision_config=copy.deepcopy(config.vision_config).to_dict(),
            text_config=copy.deepcopy(config.text_config).to_dict(),
            projection_dim=config.text_config.hidden_size,
            hidden_size=config.text_config.hidden_size,
            image_token_index=config.image_token_id,
            vocab_size=config.text_config.vocab_size,
        ),
        attn_implementation="eager",
    ).eval()
    report = theirs.load_state_dict(model.state_dict())
    assert not report.missing_keys and not report.unexpected_keys
    return theirs


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("decoder", "window"), CASES)
def test_logits_and_loss_equal_paligemma(decoder: str, window: int | None, side: str) -> None:
    settings = {} if window is None else {"sliding_window": window}
    model, _ = loud("siglip", decoder, **settings)
    theirs = twin(model)
    batch = lay_out(model, ROWS, side, labels=True)
    labels = batch.pop("labels")
    inputs = {name: value for name, value in batch.items() if name != "position_ids"}
    cap = getattr(model.config.text_config, "final_logit_softcapping", None)
    with torch.no_grad():
        raw = theirs.lm_head(theirs.model(**inputs).last_hidden_state)
        ours = model(**batch).logits
        real = batch["attention_mask"].bool()
        assert (ours - apply_softcap(raw, cap))[real].abs().max() < 1e-5
        assert ours[real].std() > 0.1
        supervised = labels[:, 1:] != -100
        wanted = F.cross_entropy(raw[:, :-1][supervised], labels[:, 1:][supervised])
        assert abs(float(model(**batch, labels=labels).loss - wanted)) < 1e-5
        # transformers 5.17 leaves the final soft-cap out of PaliGemma, 5.23 applies it, in the loss too.
        out = theirs(**inputs, labels=labels)
        capped = apply_softcap(raw, cap)
        assert torch.allclose(out.logits, capped, atol=1e-6) or torch.allclose(out.logits, raw, atol=1e-6)
        model.config.softcap_in_loss = cap is not None and torch.allclose(out.logits, capped, atol=1e-6)
        try:
            assert abs(float(model(**batch, labels=labels).loss - out.loss)) < 1e-5
        finally:
            model.config.softcap_in_loss = False


def test_gradients_equal_paligemma() -> None:
    model = copy.deepcopy(loud("siglip", "gemma")[0])
    theirs = twin(model)
    batch = lay_out(model, ROWS, labels=True)
    model(**batch).loss.backward()
    theirs(**{name: value for name, value in batch.items() if name != "position_ids"}).loss.backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        theirs_grad = wanted[name].grad
        assert parameter.grad is not None and theirs_grad is not None, name
        assert torch.allclose(parameter.grad, theirs_grad, atol=1e-6, rtol=1e-4), name


@pytest.mark.parametrize(("decoder", "window"), CASES)
def test_greedy_ids_equal_paligemma(decoder: str, window: int | None) -> None:
    settings = {} if window is None else {"sliding_window": window}
    model, _ = loud("siglip", decoder, **settings)
    theirs = twin(model)
    batch = lay_out(model, [[sample(5, 0, 1)], [sample(9, 0, 2)]], "left")
    inputs = {name: value for name, value in batch.items() if name != "position_ids"}
    options: dict[str, Any] = {
        "max_new_tokens": 10,
        "do_sample": False,
        "suppress_tokens": [model.config.image_token_id],
    }
    length = batch["input_ids"].shape[1]
    one: Any = model
    two: Any = theirs
    got = one.generate(**batch, **options)[:, length:]
    assert torch.equal(got, two.generate(**inputs, **options)[:, length:])
    assert len(set(got.flatten().tolist())) > 5


def test_parameter_names_are_paligemmas() -> None:
    for decoder in ("gemma", "gemma2"):
        model, _ = loud("siglip", decoder)
        assert model.state_dict().keys() == twin(model).state_dict().keys()
