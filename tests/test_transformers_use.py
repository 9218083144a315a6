"""The model as transformers' own code uses it: its Trainer, the order of output fields, AutoModel, and a `Batch` as the
mapping that such code expects."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coretools import IMAGE_TOKENS, loud, picture
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForImageTextToText, Trainer, TrainingArguments

import vlm
from vlm.errors import ConfigError, DataError
from vlm.model.batch import Batch
from vlm.model.forward import VLM, VLMModel

SUFFIXES = ["a", "no", "a red square on a blue ground", "two green circles and one very small yellow triangle"] * 4
"""Of very different length: a mean of means differs from the mean."""


def batch_of(numbers: Any) -> Batch:
    _, processor = loud("siglip", "gemma")
    chosen = [int(n) for n in numbers]
    made: Batch = processor([picture(n) for n in chosen], ["caption en"] * len(chosen), [SUFFIXES[n] for n in chosen])
    return made


def own() -> VLM:
    return copy.deepcopy(loud("siglip", "gemma")[0])


def trainer(model: nn.Module, folder: Path, per_device: int = 16, accumulate: int = 1, **more: Any) -> Trainer:
    """One step of plain gradient descent with rate 1: the weights move by the gradient."""
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=per_device,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=accumulate,
        max_steps=1,
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    steady = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    data: Any = list(range(16))
    collate: Any = batch_of
    return Trainer(
        model, arguments, collate, train_dataset=data, eval_dataset=data, optimizers=(optimizer, steady), **more
    )


def loss_by_hand(model: VLM, batch: Batch) -> Tensor:
    """From the logits of the whole batch: the mean over all supervised tokens."""
    labels = batch["labels"]
    logits = model(**{name: batch[name] for name in batch if name != "labels"}).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize(("per_device", "accumulate"), [(16, 1), (4, 4), (1, 16)])
def test_accumulation_under_transformers_trainer(per_device: int, accumulate: int, tmp_path: Path) -> None:
    model = own()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = loss_by_hand(model, batch_of(range(16)))
    grads = dict(zip(before, torch.autograd.grad(wanted, list(model.parameters())), strict=True))
    run = trainer(model, tmp_path, per_device, accumulate)
    run.train()
    assert np.isclose(next(log["loss"] for log in run.state.log_history if "loss" in log), float(wanted), rtol=1e-4)
    assert np.isclose(run.state.log_history[0]["grad_norm"], _norm(grads), rtol=1e-3)
    for name, parameter in model.named_parameters():
        assert torch.allclose(before[name] - parameter, grads[name], atol=2e-5), name


def _norm(grads: dict[str, Tensor]) -> float:
    return float(torch.stack([grad.norm() for grad in grads.values()]).norm())


def test_trainer_predicts_logits(tmp_path: Path) -> None:
    """`predict`, `evaluate` and `compute_metrics` get the logits of every position, and nothing else."""
    model = own()
    seen: list[Any] = []

    def metrics(found: Any) -> dict[str, float]:
        seen.append(found)
        return {"tokens": float((found.label_ids != -100).sum())}

    run = trainer(model, tmp_path, compute_metrics=metrics)
    data: Any = list(range(16))
    found: Any = run.predict(data)
    assert isinstance(found.predictions, np.ndarray) and found.predictions.shape[::2] == (16, 1600)
    assert found.predictions.shape[:2] == found.label_ids.shape
    whole = batch_of(range(12, 16))  # the last of the four batches
    with torch.no_grad():
        logits = model(**{name: whole[name] for name in whole if name != "labels"}).logits
    assert np.allclose(found.predictions[12:, : logits.shape[1]], logits.numpy(), atol=1e-4)
    scores = run.evaluate()
    assert scores["eval_tokens"] == float((batch_of(range(16))["labels"] != -100).sum())
    assert np.isclose(scores["eval_loss"], _mean_of_batches(model), rtol=1e-5)
    assert len(seen) == 2


def _mean_of_batches(model: VLM) -> float:
    """What the Trainer reports: the mean over evaluation batches of four."""
    with torch.no_grad():
        return float(np.mean([float(loss_by_hand(model, batch_of(range(n, n + 4)))) for n in range(0, 16, 4)]))


def test_order_of_output_fields() -> None:
    """loss, logits, cache, hidden states, attentions, image tokens, as transformers has them; ours at the end."""
    model = own()
    batch = batch_of(range(2))
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True, use_cache=True)
        assert list(out)[:2] == ["loss", "logits"] and list(out)[2] in ("cache", "past_key_values")
        assert list(out)[3:] == ["hidden_states", "image_hidden_states", "loss_sum", "loss_weight"]
        assert out[0] is out.loss and out[1] is out.logits and out[0].ndim == 0 and out[1].ndim == 3
        plain = model(**batch, return_dict=False)
        assert isinstance(plain, tuple) and torch.equal(plain[0], out.loss) and torch.equal(plain[1], out.logits)
        del batch["labels"]
        assert model(**batch)[0].ndim == 3 and model(**batch, return_dict=False)[0].ndim == 3
    trained = model(**batch_of(range(2)))
    assert list(trained)[0] == "loss" and trained.logits is None
    assert model(**batch_of(range(2)), skip_logits=False).logits.shape == out.logits.shape
    some = model(**batch_of(range(2)), logits_to_keep=2).logits
    assert torch.allclose(some, out.logits[:, -2:], atol=1e-5)


def test_a_step_of_training_makes_no_logits() -> None:
    """Nor does it in train mode without gradients; evaluation does unless it is told not to."""
    model = own()
    batch = batch_of(range(2))
    rows = int((batch["labels"] != -100).sum())
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[:-1].numel()))
    model(**batch)
    with torch.no_grad():
        model.train()(**batch)
        model.eval()(**batch, skip_logits=True)
        assert seen == [rows] * 3
        model(**batch)
    assert seen[3:] == [rows, batch["input_ids"].numel()]


def test_num_items_in_batch() -> None:
    model = own()
    batch = batch_of(range(3))
    out = model(**batch)
    for items in (50, torch.tensor(50)):
        again = model(**batch, num_items_in_batch=items)
        assert torch.allclose(again.loss, out.loss_sum / 50) and torch.equal(again.loss_weight, out.loss_weight)
    with pytest.raises(ConfigError, match="counts tokens, this reduction counts examples"):
        model(**batch, num_items_in_batch=50, reduction="example")


def test_auto_model_takes_a_whole_batch(tmp_path: Path) -> None:
    """Without the output layer, as transformers' AutoModel and TRL call it; the training batch too."""
    model, processor = loud("siglip2_naflex", "gemma")
    vlm.save(model, processor, tmp_path / "m")
    base = AutoModel.from_pretrained(tmp_path / "m").eval()
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "m").eval()
    assert isinstance(base, VLMModel) and isinstance(whole, VLM)
    images = [picture(1, (60, 30)), picture(2, (20, 90))]
    batch = processor(images, ["caption en"] * 2, ["a red square", "no"])
    with torch.no_grad():
        wanted = model(**batch, output_hidden_states=True).hidden_states[-1]
        out = base(**batch)
        assert torch.allclose(out.last_hidden_state, wanted, atol=1e-5)
        assert torch.equal(out.image_hidden_states, base.image_tokens(**_pixels(batch))[0])
        assert torch.allclose(base(**batch, return_dict=False)[0], wanted, atol=1e-5)
        text = {name: batch[name] for name in batch if name not in (*_pixels(batch), "input_ids")}
        embeds, _ = base.embed(batch["input_ids"], base.encode(**_pixels(batch)))
        assert torch.allclose(base(inputs_embeds=embeds, **text).last_hidden_state, wanted, atol=1e-5)
        assert torch.allclose(whole.model(**batch).last_hidden_state, wanted, atol=1e-5)
    with pytest.raises(DataError, match="image placeholders but no pixel_values"):
        base(input_ids=batch["input_ids"], **text)


def _pixels(batch: Batch) -> dict[str, Tensor]:
    return {name: batch[name] for name in batch if name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")}


def test_a_batch_is_a_mapping() -> None:
    batch = batch_of(range(3))
    names = ["input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "pixel_values"]
    assert isinstance(batch, Mapping) and list(batch) == list(batch.keys()) == names
    assert "labels" in batch and "sequence_ids" not in batch and "ids" not in batch and 0 not in batch
    assert dict(batch) == {**batch} == dict(batch.items()) and len(batch.keys()) == len(batch.values()) == 6
    assert batch.get("sequence_ids") is None and batch.get("labels") is batch.labels
    assert len(batch) == 3  # samples
    with pytest.raises(KeyError):
        batch["sequence_ids"]
    again = type(batch)({name: tensor.clone() for name, tensor in batch.items()})
    assert list(again) == names and again.ids == [] and torch.equal(again["labels"], batch["labels"])
    labels = batch.pop("labels")
    assert labels.shape[0] == 3 and "labels" not in batch and batch.labels is None
    batch["labels"] = labels
    assert batch.labels is labels and batch.ids == ["0", "1", "2"]
    with pytest.raises(DataError, match="a batch holds tensors called"):
        batch["use_cache"] = labels
    with pytest.raises(TypeError, match="did you mean 'labels'"):
        Batch(**batch, lables=labels)
    with pytest.raises(TypeError, match="needs attention_mask"):
        Batch(input_ids=labels)
    assert IMAGE_TOKENS * 3 == int((batch["input_ids"] == own().config.image_token_id).sum())


def test_auto_classes_open_our_models_after_one_import() -> None:
    """In a process of its own: here everything has been imported already."""
    code = """
import vlm.model
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
config = AutoConfig.for_model("vlm", image_token_id=7)
print(type(config).__name__)
for auto in (AutoModel, AutoModelForImageTextToText):
    print(auto._model_mapping[type(config)].__name__)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
print(PROCESSOR_MAPPING[type(config)].__name__)
"""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split() == ["VLMConfig", "VLMModel", "VLM", "Processor"]
