"""What one optimizer step does, against a plain torch loop, and what must never change."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from traintools import align, config, difference, tune, weights, world

import vlm
import vlm.train
from vlm.build.presets import tiny
from vlm.data.order import Mixture, stage_seed
from vlm.data.reading import read
from vlm.errors import TrainingError
from vlm.settings import from_dict
from vlm.train import StageConfig, freezing, optim
from vlm.train.schedule import multiplier


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def still(**changes: Any) -> dict[str, Any]:
    """A full stage of a model without dropout: only then may batches be cut up without changing the numbers."""
    return tune(name="still", **changes)


@pytest.fixture(scope="module")
def no_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = vlm.load(world()[0])
    model.config.text_config.attention_dropout = model.config.vision_config.attention_dropout = 0.0
    return vlm.save(model, processor, tmp_path_factory.mktemp("steps") / "start")


@pytest.fixture(scope="module")
def whole(no_dropout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of 3 steps on whole batches, by reduction."""
    outs = {}
    for reduction in ("token", "example"):
        outs[reduction] = tmp_path_factory.mktemp("whole") / reduction
        stage = still(steps=3, loss_reduction=reduction, clip_norm=0.5)
        vlm.train.run(config(outs[reduction], stage, model={"path": no_dropout}))
    return outs


@pytest.mark.parametrize("reduction", ["token", "example"])
def test_three_steps_equal_a_loop_written_in_plain_torch(
    reduction: str, no_dropout: Path, whole: dict[str, Path]
) -> None:
    """The loop below uses neither Lightning nor vlm.train's optimizer, loss sums or clipping."""
    model, processor = vlm.load(no_dropout)
    examples, _ = read(world()[1])
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), foreach=False, fused=False)
    order = Mixture((len(examples),), (1.0,), stage_seed(0, 0))
    stage = from_dict(StageConfig, still(steps=3))
    recorded = rows(whole[reduction])
    for step in range(3):
        chosen = [examples[order.example(4 * step + i)] for i in range(4)]
        batch = processor([e.image for e in chosen], [e.prefix for e in chosen], [e.suffix or "" for e in chosen])
        tensors = {name: batch[name] for name in batch.keys()}
        labels = tensors.pop("labels")
        # Logits of the whole sequence, as in the definition; token t is predicted at t - 1.
        logits = model(**tensors).logits[:, :-1].flatten(0, 1)
        each = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none").view(4, -1)
        counts = (labels[:, 1:] != -100).sum(1)
        loss = each.sum() / counts.sum() if reduction == "token" else (each.sum(1) / counts).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * multiplier(stage, step, 3)
        optimizer.step()
        assert float(recorded[step]["loss"]) == pytest.approx(loss.item(), rel=1e-6)
        assert float(recorded[step]["grad_norm"]) == pytest.approx(norm.item(), rel=1e-5)
        assert int(recorded[step]["tokens"]) == counts.sum()
    trained = weights(whole[reduction] / "model")
    named = dict(model.named_parameters())
    worst = max(float((trained[name] - p.detach()).abs().max()) for name, p in named.items() if name in trained)
    assert len(set(trained) & set(named)) > 40
    # Adam divides by the root of tiny second moments, which magnifies the last bits of small gradients.
    assert worst < 2e-5


@pytest.mark.parametrize("reduction", ["token", "example"])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_changes_nothing(
    accumulate: int, reduction: str, no_dropout: Path, whole: dict[str, Path], tmp_path: Path
) -> None:
    """Answers have 1, 2 and 3 words, so a mean of the micro-batches' means would be another number."""
    stage = still(steps=3, loss_reduction=reduction, clip_norm=0.5, accumulate=accumulate)
    vlm.train.run(config(tmp_path / "out", stage, model={"path": no_dropout}))
    for one, two in zip(rows(whole[reduction]), rows(tmp_path / "out"), strict=True):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-6)
        assert float(one["grad_norm"]) == pytest.approx(float(two["grad_norm"]), rel=1e-6)
    assert difference(whole[reduction] / "model", tmp_path / "out" / "model") < 2e-5


def test_each_step_records_which_examples_it_saw(whole: dict[str, Path], no_dropout: Path) -> None:
    """From the plan and the file by hand: 32 bits of the hash of each id and the ids of its suffix and EOS."""
    examples = read(world()[1])[0]
    tokenizer = vlm.Processor.from_pretrained(no_dropout).tokenizer
    mixture = Mixture((len(examples),), (1.0,), stage_seed(0, 0))

    def bits(position: int) -> int:
        example = examples[mixture.example(position)]
        said = tokenizer(example.suffix, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return int(hashlib.sha256(f"{example.id} {said}".encode()).hexdigest()[:8], 16)

    found = [int(row["seen"]) for row in rows(whole["token"])]
    assert len(set(found)) == 3 and found == [sum(map(bits, range(4 * step, 4 * step + 4))) for step in range(3)]


# --- freezing


@pytest.mark.parametrize(
    ("module", "train"),
    [("frozen_encoder", {"projector"}), ("frozen_encoder", {"projector", "decoder"}), ("full", {"encoder"})],
)
def test_frozen_parts_stay_bit_equal_and_the_others_move(module: str, train: set[str], tmp_path: Path) -> None:
    stage = align(module=module, train=dict.fromkeys(train, 1e-2), steps=2, weight_decay=0.5)
    vlm.train.run(config(tmp_path / "out", stage))
    before, _ = vlm.load(world()[0])
    after, _ = vlm.load(tmp_path / "out" / "model")
    for part, module_after in after.parts().items():
        pairs = zip(before.parts()[part].state_dict().items(), module_after.state_dict().items(), strict=True)
        changed = [name for (name, a), (_, b) in pairs if not torch.equal(a, b)]
        assert bool(changed) == (part in train), (part, changed)
    manifest = json.loads((tmp_path / "out" / "align" / "manifest.json").read_text())
    assert set(manifest["frozen_before"]) == {"encoder", "projector", "decoder"} - train
    assert manifest["frozen_before"] == manifest["frozen_after"]


def test_frozen_parts_cannot_be_put_back_into_train_mode() -> None:
    model, _ = vlm.load(world()[0])
    stage = from_dict(StageConfig, align())
    encoder, decoder = model.parts()["encoder"], model.parts()["decoder"]
    with freezing.frozen(model, stage):
        for attempt in (model, model.model, encoder, nn.Sequential(model)):
            attempt.train()
            frozen = [*encoder.modules(), *model.model.language_model.modules()]
            assert not any(module.training for module in frozen)
            assert model.training and model.model.multi_modal_projector.training
        assert not any(p.requires_grad for part in (encoder, decoder) for p in part.parameters())
    assert not model.training and not encoder.training
    assert model.train().model.vision_tower.training and all(p.requires_grad for p in model.parameters())


def test_the_decoder_trains_with_dropout_although_loading_gives_eval_mode(tmp_path: Path) -> None:
    """Lightning keeps the modes it finds; a run that trusted it would train without dropout."""
    stage = tune(train={"decoder": 1e-9}, steps=1, batch_size=24)
    with_dropout, without = tmp_path / "with", tmp_path / "without"
    vlm.train.run(config(with_dropout, stage))
    model, processor = vlm.load(world()[0])
    model.config.text_config.attention_dropout = 0.0
    vlm.save(model, processor, tmp_path / "start")
    vlm.train.run(config(without, stage, model={"path": tmp_path / "start"}))
    assert rows(with_dropout)[0]["loss"] != rows(without)[0]["loss"]


def test_the_manifest_names_every_parameter_once_with_its_treatment() -> None:
    model, _ = vlm.load(world()[0])
    stage = from_dict(StageConfig, align(train={"projector": 1e-2, "decoder": 1e-4}, weight_decay=0.1))
    with freezing.frozen(model, stage):
        manifest = freezing.manifest(model, stage)
        freezing.check_manifest(model, stage, manifest, "never")
        by_name = {row.name: row for row in manifest}
        assert list(by_name) == [name for name, _ in model.named_parameters()]
        assert {row.part for row in manifest if row.lr is None} == {"encoder"}
        projector = (
            by_name["model.multi_modal_projector.linear.weight"],
            by_name["model.multi_modal_projector.linear.bias"],
        )
        assert [(row.lr, row.weight_decay) for row in projector] == [(1e-2, 0.1), (1e-2, 0.0)]
        norms = [row for row in manifest if "norm" in row.name and row.part == "decoder"]
        assert len(norms) > 3 and all(row.weight_decay == 0 for row in norms)
        assert freezing.table(manifest).splitlines()[1].split()[-2:] == ["frozen", "-"]
        next(model.parts()["encoder"].parameters()).requires_grad_(True)
        with pytest.raises(TrainingError, match=r"what trains changed by hand: .* \(1 parameters\)"):
            freezing.check_manifest(model, stage, manifest, "by hand")


class TwoParts(nn.Module):
    """A model with a shared parameter, or one outside its parts."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        if shared:
            self.b.weight = self.a.weight
        else:
            self.c = nn.Parameter(torch.zeros(1))

    def parts(self) -> dict[str, nn.Module]:
        return {"encoder": self.a, "decoder": self.b}


@pytest.mark.parametrize(
    ("shared", "message"),
    [(True, "shared by the parts encoder and decoder"), (False, "parameter c belongs to no part")],
)
def test_a_parameter_in_two_parts_or_none_is_refused(shared: bool, message: str) -> None:
    stage = from_dict(StageConfig, tune())
    with pytest.raises(TrainingError, match=message):
        freezing.manifest(TwoParts(shared), stage)


def test_zero_trainable_parameters_are_refused() -> None:
    model = TwoParts(shared=False)
    model.parts = lambda: {"encoder": model.a, "projector": nn.Identity(), "decoder": model.b}  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"no parameter would train \(projector have none\)"):
        freezing.freeze(model, from_dict(StageConfig, align()))
    with pytest.raises(TrainingError, match="has no part 'projector'; it has encoder, decoder"):
        freezing.freeze(TwoParts(shared=False), from_dict(StageConfig, align()))


def test_optimizer_state_goes_to_tensors_and_back_by_name() -> None:
    model, _ = vlm.load(world()[0])
    stage = from_dict(StageConfig, tune())
    manifest = freezing.manifest(model, stage)
    optimizer = optim.adamw(model, manifest, stage)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = {name: tensor.clone() for name, tensor in optim.state_tensors(optimizer).items()}
    assert saved[
        "lm_head.weight.exp_avg" if "lm_head.weight.exp_avg" in saved else next(iter(saved))
    ].is_floating_point()
    assert len(saved) == 3 * len(list(model.parameters()))
    again = optim.adamw(model, manifest, stage)
    optim.load_state_tensors(again, saved)
    restored = optim.state_tensors(again)
    assert restored.keys() == saved.keys() and all(torch.equal(restored[name], saved[name]) for name in saved)
    assert all(restored[name].data_ptr() != saved[name].data_ptr() for name in saved)
    with pytest.raises(vlm.errors.CheckpointError, match="optimizer state ghost.exp_avg"):
        optim.load_state_tensors(again, {"ghost.exp_avg": torch.zeros(2)})


# --- numbers that are none


def test_a_non_finite_loss_stops_before_the_step_and_names_step_and_samples(tmp_path: Path) -> None:
    model, processor = vlm.load(world()[0])
    with torch.no_grad():
        # Finite, as loading demands, and too large: the logits overflow.
        model.get_parameter("model.language_model.norm.weight").fill_(3e38)
    vlm.save(model, processor, tmp_path / "start")
    run = config(tmp_path / "out", align(batch_size=2), model={"path": tmp_path / "start"})
    with pytest.raises(
        TrainingError, match=r"stage align, step 1: the loss is (nan|inf); samples: s\d+, s\d+; learning rates: "
    ):
        vlm.train.run(run)
    assert not (tmp_path / "out" / "align" / "model").exists()


def test_a_non_finite_gradient_leaves_the_last_checkpoint_and_names_the_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tmp_path / "out", align(steps=4))
    original = vlm.VLM.forward

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        if self.training and (tmp_path / "out" / "metrics.csv").read_text().count("\n") == 4:  # step 4
            # finite loss, infinite derivative: d sqrt(x) / dx at 0
            zero = self.model.multi_modal_projector.linear.bias.sum() * 0
            out.loss_sum = out.loss_sum + zero.sqrt()
        return out

    monkeypatch.setattr(vlm.VLM, "forward", poisoned)
    with pytest.raises(TrainingError, match=r"step 4: the gradient norm is (nan|inf) \(model.multi_modal_projector"):
        vlm.train.run(run)
    assert [row["step"] for row in rows(run.out)] == ["1", "2", "3"]
    assert [path.name for path in (run.out / "align" / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.setattr(vlm.VLM, "forward", original)
    vlm.train.run(run, resume=True)
    clean = config(tmp_path / "clean", align(steps=4))
    vlm.train.run(clean)
    assert difference(run.out / "model", clean.out / "model") == 0


# --- parts that learn nothing


def untouched(tmp_path: Path) -> Path:
    """A model whose projector is zero, as it begins: nothing comes through it, and no gradient goes back."""
    model, processor = tiny()
    assert not model.get_parameter("model.multi_modal_projector.linear.weight").any()
    vlm.save(model, processor, tmp_path / "zero")
    return tmp_path / "zero"


def test_a_part_that_gets_no_gradient_stops_the_run(tmp_path: Path) -> None:
    """The tower trains behind a frozen projector of zeros: its gradient is zero in every step."""
    run = config(tmp_path / "out", tune(train={"encoder": 1e-3}, steps=3), model={"path": untouched(tmp_path)})
    with pytest.raises(
        TrainingError,
        match=r"stage tune, step 3: the gradient of the encoder \(learning rate 0.001\) was zero in the last 2 steps",
    ):
        vlm.train.run(run)
    assert [row["step"] for row in rows(run.out)] == ["1", "2"]


def test_a_projector_of_zeros_that_trains_is_no_dead_part(tmp_path: Path) -> None:
    """By the product rule the tower's gradient is zero in the first step only."""
    run = config(
        tmp_path / "out", tune(train={"encoder": 1e-3, "projector": 1e-3}, steps=3), model={"path": untouched(tmp_path)}
    )
    vlm.train.run(run)
    assert len(rows(run.out)) == 3


def test_weights_that_a_step_has_spoiled_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.train import optim

    original = optim.set_rates
    steps: list[float] = []

    def wild(optimizer: torch.optim.Optimizer, multiplier: float) -> dict[str, float]:
        """In the last step the rate is beyond float32."""
        steps.append(multiplier)
        return original(optimizer, 1e42 if len(steps) == 4 else multiplier)

    monkeypatch.setattr(optim, "set_rates", wild)
    run = config(tmp_path / "out", align(steps=4))
    with pytest.raises(
        TrainingError, match=r"stage align, step 4: after this step \d of 2 trained tensors hold nan or inf"
    ):
        vlm.train.run(run)
    assert [path.name for path in (run.out / "align" / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.setattr(optim, "set_rates", original)
    assert vlm.train.run(run, resume=True).is_dir()
