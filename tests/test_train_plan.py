"""Order, schedule and configuration of training: pure functions."""

import math
from collections import Counter
from pathlib import Path

import pytest

from vlm.data.order import Key, Mixture, StepSampler, stage_seed, steps_of
from vlm.errors import ConfigError
from vlm.settings import from_dict
from vlm.train import RunConfig, StageConfig, load_config
from vlm.train.schedule import multiplier

STAGE = {"name": "s", "module": "full", "train": {"decoder": 1.0}, "steps": 100, "batch_size": 4}


def stage(**changes: object) -> StageConfig:
    return from_dict(StageConfig, {**STAGE, **changes})


def line(mixture: Mixture, first: int, last: int) -> list[int]:
    return [mixture.example(position) for position in range(first, last)]


def test_every_epoch_shows_every_example_once_in_another_order() -> None:
    mixture = Mixture((10,), (1.0,), seed=3)
    epochs = [line(mixture, 10 * e, 10 * e + 10) for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert line(Mixture((10,), (1.0,), seed=4), 0, 10) != epochs[0]


def test_the_order_is_written_down() -> None:
    # A later version that shuffled in another way would silently resume runs with other data.
    assert line(Mixture((8,), (1.0,), seed=0), 0, 16) == [3, 5, 6, 1, 0, 7, 2, 4, 7, 0, 6, 2, 3, 5, 1, 4]
    assert (stage_seed(0, 0), stage_seed(0, 1)) == (874448054186812124, 209602612109023050)


def test_repeats_count_per_epoch() -> None:
    mixture = Mixture((4, 6, 10), (2.0, 1.5, 0.3), seed=1)
    assert mixture.epoch_length == 8 + 9 + 3
    for epoch in range(2):
        seen = Counter(line(mixture, 20 * epoch, 20 * epoch + 20))
        assert [seen[i] for i in range(4)] == [2] * 4
        assert sorted(seen[i] for i in range(4, 10)) == [1, 1, 1, 2, 2, 2]
        assert sum(seen[i] for i in range(10, 20)) == 3 and max(seen[i] for i in range(10, 20)) == 1
    halves = [{i for i in line(mixture, 20 * e, 20 * e + 20) if i >= 10} for e in range(8)]
    assert len(set.union(*halves)) > 3, "a fraction must not be the same examples in every epoch"


def test_substitutes_are_examples_and_depend_on_place_and_attempt() -> None:
    mixture = Mixture((1000,), (1.0,), seed=0)
    drawn = [mixture.substitute(position, attempt) for position in range(50) for attempt in range(3)]
    assert all(0 <= index < 1000 for index in drawn) and len(set(drawn)) > 130
    assert drawn == [mixture.substitute(position, attempt) for position in range(50) for attempt in range(3)]


def test_ranks_and_micro_batches_share_each_step_as_the_docstring_draws_it() -> None:
    keys = {rank: list(StepSampler(0, 1, 8, accumulate=2, rank=rank, world=2)) for rank in (0, 1)}
    assert keys[0] == [Key(0, 0, 0, 2), Key(0, 1, 2, 2)] and keys[1] == [Key(0, 0, 4, 2), Key(0, 1, 6, 2)]
    assert list(keys[1][1].positions) == [6, 7]


@pytest.mark.parametrize(("accumulate", "world"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_a_step_sees_the_same_examples_however_it_is_cut_up(accumulate: int, world: int) -> None:
    seen = []
    for rank in range(world):
        sampler = StepSampler(5, 7, 12, accumulate=accumulate, rank=rank, world=world)
        keys = list(sampler)
        assert len(keys) == len(sampler) == 2 * accumulate
        seen += [position for key in keys for position in key.positions]
    assert sorted(seen) == list(range(60, 84))


def test_resuming_is_counting_from_a_later_step() -> None:
    whole = list(StepSampler(0, 10, 6, accumulate=3))
    assert list(StepSampler(4, 10, 6, accumulate=3)) == whole[12:]


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size 6 .* 4 processes x 1 .* multiple of 4"):
        StepSampler(0, 1, 6, world=4)


def test_steps_of_epochs() -> None:
    assert (steps_of(1, 10, 4), steps_of(2, 10, 4), steps_of(0.1, 10, 4)) == (3, 5, 1)


# --- schedule


def rates(steps: int = 10, **changes: object) -> list[float]:
    return [multiplier(stage(**changes), step, steps) for step in range(steps)]


def test_warm_up_counts_from_one_and_takes_steps_or_a_fraction() -> None:
    assert rates(schedule="constant", warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(schedule="constant", warmup=0.4) == rates(schedule="constant", warmup=4)


def test_linear_and_cosine_by_hand() -> None:
    assert rates(5, schedule="linear", warmup=1, final=0.2) == pytest.approx([1, 1, 0.8, 0.6, 0.4])
    # After the warm-up step: 0.5 * (1 + cos(pi * k / 4)) for k = 0..3
    half = math.sqrt(0.5)
    assert rates(5, schedule="cosine", warmup=1) == pytest.approx([1, 1, (1 + half) / 2, 0.5, (1 - half) / 2])


def test_rsqrt_by_hand_and_without_an_end() -> None:
    assert rates(4, schedule="rsqrt", warmup=0, timescale=1) == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5])
    config = stage(schedule="rsqrt", warmup=0, timescale=100)
    assert multiplier(config, 300, 301) == multiplier(config, 300, 10**6) == 0.5


# --- configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "either `steps` or `epochs`"),
        ({"epochs": 1}, "either `steps` or `epochs`"),
        ({"steps": 0}, "steps must be above 0, got 0"),
        ({"train": {}}, "nothing trains"),
        ({"train": {"decoders": 1e-3}}, r"unknown part 'decoders' \(did you mean 'decoder'\?\)"),
        ({"train": {"decoder": 0}}, "leave the part out to freeze it"),
        ({"module": "frozen_encoder", "train": {"encoder": 1e-3}}, "freezes the encoder; use module full"),
        ({"batch_size": 6, "accumulate": 4}, "batch_size 6 cannot be cut into 4 equal"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"clip_norm": 0}, "clip_norm must be above 0"),
        ({"name": "a/b"}, "stage name 'a/b'"),
        ({"name": "model"}, "stage name 'model'"),
        ({"schedule": "cosin"}, "expected one of 'constant', 'linear', 'cosine', 'rsqrt'"),
        ({"lr": 1}, "unknown key 'lr'"),
        ({"name": "tensorboard"}, "stage name 'tensorboard'"),
        # What could not act, or would leave nothing of the weights.
        ({"train": {"projector": 1e30}}, r"stage s: train.projector: a learning rate of 1e\+30 cannot train"),
        ({"train": {"projector": 1e-30}}, "a learning rate of 1e-30 cannot train"),
        ({"schedule": "constant", "final": 0.1}, "final 0.1 has no effect on the schedule 'constant'"),
        ({"schedule": "rsqrt", "final": 0.1}, "final 0.1 has no effect on the schedule 'rsqrt'"),
        ({"schedule": "cosine", "timescale": 5}, "timescale 5 has no effect on the schedule 'cosine'"),
        ({"warmup": 2.5}, "warmup 2.5 is no whole number of steps"),
        ({"warmup": -1}, "warmup must be 0 or more"),
        ({"weight_decay": -1}, "weight_decay must be 0 or more"),
        ({"train": {"decoder": 0.1}, "weight_decay": 10}, "every step would wipe the weights out"),
        ({"eps": 1e-50}, "eps must be between"),
        ({"eps": 10}, "eps must be between"),
    ],
)
def test_stages_that_make_no_sense_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": []}, "at least one stage"),
        ({"stages": [STAGE, STAGE]}, "its own name, got s, s"),
        ({"model": {"path": "a", "encoder": "b"}}, "give either `path`, or `encoder` and `decoder`"),
        ({"model": {}}, "give either `path`"),
        ({"model": {"encoder": "a"}}, "needs both"),
        ({"model": {"path": "a", "tokenizer": "b"}}, "`tokenizer` is for a new model"),
        ({"validate_every": 5}, "validate_every is set, but there is nothing to validate on; add `val`"),
        ({"evaluate_every": 5}, "evaluate_every is set, but nothing says what to evaluate"),
        ({"data": {"train": [{"path": "a"}], "image_root": "b"}}, "image_root is for one training file and for `val`"),
        ({"evaluate": {"data": "a", "tasks": "vqav2", "max_new_tokens": 9}}, "max_new_tokens is for a JSONL file"),
        ({"evaluate": {"data": "a", "tasks": "vqav2", "image_root": "b"}}, "image_root is for a JSONL file"),
        ({"data": {"train": []}}, "the list of files is empty"),
        ({"data": {"train": [{"path": "a", "repeat": 0}]}}, "repeat must be above 0"),
        ({"devices": 0}, "devices must be above 0"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_runs_that_make_no_sense_are_refused(changes: dict, message: str) -> None:
    values = {"out": "o", "model": {"path": "m"}, "data": {"train": "t"}, "stages": [STAGE], **changes}
    with pytest.raises(ConfigError, match=message):
        from_dict(RunConfig, values)


def test_mixtures_are_read_from_yaml_shapes() -> None:
    sources = [{"path": "a.jsonl", "repeat": 2}, {"path": "b.jsonl", "image_root": "pics"}]
    values = {"out": "o", "model": {"path": "m"}, "data": {"train": sources}, "stages": [STAGE]}
    config = from_dict(RunConfig, values)
    assert [(str(s.path), s.repeat, str(s.image_root)) for s in config.data.sources()] == [
        ("a.jsonl", 2.0, "None"),
        ("b.jsonl", 1.0, "pics"),
    ]


def test_the_yaml_of_the_documentation_is_a_run(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    runs = [block.split("```")[0] for block in text.split("```yaml\n")[1:]]
    file = tmp_path / "run.yaml"
    file.write_text(runs[0])
    config = load_config(file, ["stages.0.steps=100"])
    assert [stage.name for stage in config.stages] == ["align", "tune"] and config.stages[0].steps == 100
    file.write_text(runs[0].split("data:")[0] + runs[1] + "stages:" + runs[0].split("stages:")[1])
    assert [source.repeat for source in load_config(file).data.sources()] == [1.0, 2.0, 0.5]
