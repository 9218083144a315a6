"""The parts of a comparison against hand-worked numbers: statistics, token matching, the plan, refusals."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import comparetools
import pytest
import yaml

from vlm.cli import main
from vlm.compare import compare, fixed, match, processes, statistics
from vlm.compare.config import Arm, load_config, make_arms, run_config
from vlm.compare.match import make_tower
from vlm.compare.statistics import Paired
from vlm.errors import ConfigError, TrainingError
from vlm.eval.metrics import registry
from vlm.images.transforms import naflex_grid

# --- statistics


@pytest.mark.parametrize(
    ("degrees", "value"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_t_quantiles_are_those_of_the_printed_table(degrees: int, value: float) -> None:
    assert statistics.t_quantile(0.975, degrees) == pytest.approx(value, abs=5e-5)


def test_t_is_cauchys_for_one_degree_and_known_in_closed_form_for_two() -> None:
    for t in (0.0, 0.3, 1.0, 7.0):
        assert statistics.t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi)
        assert statistics.t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)))


def test_interval_over_seeds_by_hand() -> None:
    """0.5, 0.6, 0.7: s = 0.1, s / sqrt(3) = 0.0577350, t(0.975, 2) = 4.302653."""
    found = statistics.over_seeds([0.5, 0.6, 0.7])
    assert found.mean == pytest.approx(0.6) and found.num_seeds == 3
    assert found.half_width == pytest.approx(0.2484138, abs=1e-6)
    assert statistics.over_seeds([0.5]).half_width is None


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.5, never below the one before."""
    assert statistics.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def items(values: list[float]) -> dict[str, float]:
    return {str(number): value for number, value in enumerate(values)}


def alone(count: int) -> dict[str, str]:
    """Every item has an image of its own."""
    return {str(number): f"image{number}" for number in range(count)}


def test_sign_flip_against_the_exact_distribution() -> None:
    """Differences 3, 2, -1: of the 8 totals +-3 +-2 +-1, |total| >= 4 holds for 6, 4, -4, -6: p = 1/2."""
    found = statistics.paired([items([3, 2, 0])], [items([0, 0, 1])], alone(3))
    assert found.difference == pytest.approx(4 / 3)
    assert found.p == pytest.approx(0.5, abs=0.02)
    ten = statistics.paired([items([1] * 10)], [items([0] * 10)], alone(10))
    assert ten.p == pytest.approx(2 / 2**10, abs=0.001)
    assert ten.interval == (1.0, 1.0)


def test_items_of_one_image_count_once() -> None:
    """Ten items that all say the same, of two images: of 4 sign patterns 2 are as far out: p = 1/2, not 2 / 2^10."""
    images = {str(number): f"image{number % 2}" for number in range(10)}
    found = statistics.paired([items([1] * 10)], [items([0] * 10)], images)
    assert found.p == pytest.approx(0.5, abs=0.02)
    assert (found.num_items, found.num_groups) == (10, 2)


def test_bootstrap_interval_of_a_share() -> None:
    """100 items, 60 won and 40 lost: standard error sqrt(1 - 0.2^2) / 10 = 0.098; 0.2 +- 1.96 times that."""
    first = items([1.0] * 60 + [0.0] * 40)
    found = statistics.paired([first], [{key: 1 - value for key, value in first.items()}], alone(100))
    assert found.interval is not None
    assert found.interval == pytest.approx((0.2 - 0.192, 0.2 + 0.192), abs=0.025)


def test_seeds_are_averaged_and_their_signs_counted() -> None:
    found = statistics.paired([items([1, 1]), items([0, 1])], [items([0, 0]), items([1, 1])], alone(2))
    assert found.difference == pytest.approx((1 + 1 - 1 + 0) / 4)
    assert (found.seeds_agree, found.num_seeds) == (1, 2)


def pair(difference: float, interval: tuple[float, float] | None, agree: int = 2) -> Paired:
    return Paired(difference, interval, 0.001, agree, 2, 50, 50)


@pytest.mark.parametrize(
    ("result", "p", "better"),
    [
        (pair(0.1, (0.05, 0.15)), 0.003, "first"),
        (pair(-0.1, (-0.15, -0.05)), 0.003, "second"),
        (pair(0.1, (0.05, 0.15)), 0.05, None),  # not after the correction
        (pair(0.1, (-0.01, 0.15)), 0.003, None),  # 0 is in the interval
        (pair(0.1, (0.05, 0.15), agree=1), 0.003, None),  # one seed says the opposite
        (pair(0.1, None), 0.003, None),
    ],
)
def test_better_is_only_said_when_everything_agrees(result: Paired, p: float, better: str | None) -> None:
    assert statistics.winner(result, p) == better
    said = statistics.sentence("left", "right", "task", result, p)
    winners = {"first": "left is better than right", "second": "right is better than left"}
    assert (winners[better] if better else "no difference shown") in said
    if better == "second":
        assert "0.100 (95 % interval 0.050 to 0.150)" in said


# --- matching

SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SIGLIP |= {"num_attention_heads": 4, "image_size": 224, "patch_size": 14}
NAFLEX = {**SIGLIP, "model_type": "siglip2_vision_model", "patch_size": 16, "num_patches": 256}
del NAFLEX["image_size"]
DECODER = {"model_type": "gemma", "hidden_size": 32}


def arm(name: str, encoder: dict[str, Any], projector: Any = "linear", **settings: Any) -> Arm:
    return Arm(name, "p", {"encoder": encoder, "decoder": DECODER, "projector": projector, **settings})


def table_of(arms: list[Arm], how: match.How = "tokens", target: int | None = None, sizes: Any = None) -> list[Any]:
    """(what changed, tokens, exact) per arm."""
    found = match.match(arms, how, sizes or {(100, 100): 1}, target)
    told = []
    for item in found:
        size = item.arm.model.get("image_size") or (item.arm.model.get("image") or {}).get("max_num_patches")
        told.append((size, item.tokens, item.exact))
    return told


def test_squares_get_the_size_whose_tokens_are_nearest() -> None:
    """224 px / 14 = 16 x 16 = 256 tokens."""
    arms = [
        arm("reference", SIGLIP),
        arm("patch 32", {**SIGLIP, "patch_size": 32}),  # 16 x 32 px
        arm("its own", {**SIGLIP, "image_size": 256, "patch_size": 16}),
        arm("shuffled", SIGLIP, {"kind": "pixel_shuffle", "factor": 2}),  # 32 x 14 px, blocks of 2 x 2
        arm("resampled", SIGLIP, {"kind": "resampler", "queries": 9, "heads": 4}),
        arm("given", SIGLIP, image_size=28),
    ]
    expected = [(None, 256, True), (512, 256, True), (None, 256, True), (448, 256, True), (None, 9, False)]
    assert table_of(arms) == [*expected, (28, 4, False)]


def test_what_cannot_be_matched_is_said() -> None:
    """30 tokens: 5 x 5 = 25 is nearer than 6 x 6 = 36."""
    found = match.match([arm("a", SIGLIP)], "tokens", {(100, 100): 1}, 30)
    assert (found[0].arm.model["image_size"], found[0].tokens, found[0].exact) == (70, 25, False)
    told = match.table(found, "tokens")
    assert "image size 224 -> 70 px; 25 tokens instead of 30" in told
    assert told.endswith("not matched exactly (tokens): a+p")


@pytest.mark.parametrize("target", [7, 36, 64])
def test_a_naflex_budget_is_the_best_of_all_budgets(target: int) -> None:
    sizes = {(60, 120): 3, (100, 100): 1, (40, 200): 2}

    def mean(budget: int) -> float:
        return sum(n * math.prod(naflex_grid(*size, 16, budget)) for size, n in sizes.items()) / 6

    best = min(abs(mean(budget) - target) for budget in range(1, 200))
    ((budget, tokens, _),) = table_of([arm("n", NAFLEX, image={"resample": "bilinear"})], target=target, sizes=sizes)
    assert budget is not None and tokens == mean(budget)
    assert abs(tokens - target) == best


def test_a_size_after_the_at_sign_is_kept() -> None:
    """28 px and 56 px, patches of 14: 4 and 16 tokens."""
    tower = str(comparetools.world() / "a")
    pinned = Arm("pinned", "p", {"encoder": f"{tower}@56", "decoder": DECODER})
    one, other = match.match(
        [Arm("free", "p", {"encoder": tower, "decoder": DECODER}), pinned], "tokens", {(9, 9): 1}, None
    )
    assert (one.tokens, other.tokens, other.exact) == (4, 16, False)
    assert "image_size" not in other.arm.model and other.note.startswith("size given in its settings; 16 tokens")


@pytest.mark.parametrize(("own", "budget"), [(256, None), (4, 16)])
def test_a_budget_is_not_raised_beyond_its_effect(own: int, budget: int | None) -> None:
    """64 x 64 px kept as they are have 4 x 4 patches of 16 px, however large the budget."""
    tower = arm("n", NAFLEX, image={"naflex": "native", "max_num_patches": own})
    made = match._Tower(tower, {(64, 64): 1})._budget_for(256)
    assert (made.tokens, made.transform.max_patches) == (16, budget or own)


def test_resolution_and_none() -> None:
    arms = [arm("a", SIGLIP), arm("b", {**SIGLIP, "patch_size": 32, "image_size": 384}), arm("n", NAFLEX)]
    # 224 px are 7 patches of 32 px, and 14 x 14 of 16 px for a square image.
    assert table_of(arms, "resolution") == [(None, 256, True), (224, 49, True), (196, 196, True)]
    assert table_of([arms[1], arms[0]], "resolution") == [(None, 144, True), (378, 729, False)]  # 27 x 14 px
    assert table_of(arms, "none") == [(None, 256, True), (None, 144, True), (None, 256, True)]


# --- the order of the data


def test_the_order_depends_on_the_seed_and_nothing_else() -> None:
    config = load_config(comparetools.world() / "compare.yaml")
    one, other = make_arms(config)

    def digest(which: Arm, seed: int, counts: tuple[int, ...] = (16,)) -> str:
        return fixed.order_digest(run_config(config, which, seed, Path("out")), counts)

    assert digest(one, 0) == digest(other, 0)
    assert len({digest(one, 0), digest(one, 1), digest(one, 0, (17,))}) == 3


# --- places for runs


def test_gpus_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def gpus(jobs: int | None, names: list[str]) -> list[str]:
        return [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in processes.slots(jobs, names)]

    assert gpus(None, ["0", "1", "2"]) == ["0", "1", "2"]
    assert gpus(2, ["4", "5", "6", "7"]) == ["4,6", "5,7"]
    assert gpus(3, ["0", "1"]) == ["0", "1", "0"]
    monkeypatch.setattr(processes.threads, "cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [slot.threads for slot in processes.slots(None, [])] == [6]
    assert [slot.threads for slot in processes.slots(4, [])] == [1, 1, 1, 1]
    assert processes.slots(2, [])[0].environment["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert processes.slots(None, [])[0].threads == 2


@pytest.mark.slow
def test_the_server_asks_for_no_gpu_before_it_forks() -> None:
    """What it imports must not start CUDA, whose state no forked process can use."""
    code = """
import torch
asked = []
for name in ("is_available", "device_count", "init", "current_device", "get_device_capability"):
    setattr(torch.cuda, name, lambda *a, _name=name, **k: asked.append(_name) or 0)
import vlm.build.assembly, vlm.checkpoints.saving, vlm.compare.measure, vlm.eval.harness, vlm.train.run, vlm.train.stage
print(asked)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- configuration


def test_paths_are_relative_to_the_file_and_hub_ids_stay(tmp_path: Path) -> None:
    values = comparetools.settings(encoders={"a": "a", "hub": "google/siglip-base-patch16-224"})
    (tmp_path / "a").mkdir()
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(values))
    config = load_config(tmp_path / "compare.yaml")
    assert config.encoders == {"a": str(tmp_path / "a"), "hub": "google/siglip-base-patch16-224"}
    assert config.run["data"]["train"] == str(tmp_path / "data" / "train.jsonl")
    assert config.tasks["words"].data == tmp_path / "data" / "test.jsonl"
    evaluate = {"data": "data/test.jsonl", "image_root": "data", "metrics": ["exact_match"]}
    values["run"] |= {"evaluate": evaluate, "evaluate_every": 2}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(values))
    config = load_config(tmp_path / "compare.yaml")
    found = run_config(config, make_arms(config)[0], 0, Path("out")).evaluate
    assert (
        found is not None and found.data == tmp_path / "data" / "test.jsonl" and found.image_root == tmp_path / "data"
    )


def test_every_tower_of_a_fused_one_is_found_beside_the_file(tmp_path: Path) -> None:
    from vlm.compare import config

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert config._checkpoint("a+b@378", tmp_path) == f"{a}+{b}@378"
    assert config._checkpoint(["a", "org/name", {"model_type": "x"}], tmp_path) == [a, "org/name", {"model_type": "x"}]
    assert config._checkpoint("org/name@224+b", tmp_path) == f"org/name@224+{b}"
    assert config._short("org/one+org/two.npz") == "one-two"


def test_a_tower_may_choose_its_layers() -> None:
    config = load_config(comparetools.world() / "compare.yaml")
    tower = Arm("a", "p", {"encoder": {**SIGLIP, "num_hidden_layers": 3}, "decoder": DECODER, "layer": [-2, -3]})
    chosen = make_tower(run_config(config, tower, 0, Path("out")).model).config
    assert (chosen.feature_layers, chosen.num_hidden_layers, chosen.feature_norm) == ([2, 1], 2, False)


def test_arms_are_encoders_times_projectors() -> None:
    config = load_config(comparetools.world() / "compare.yaml")
    assert [found.name for found in make_arms(config)] == ["a+linear", "b+linear"]
    tower = comparetools.world() / "a"
    found = make_arms(config, ["b", str(tower)], ["pool", "mlp"])
    with pytest.raises(ConfigError, match="both called 'a'"):
        make_arms(config, ["a", str(tower)])
    assert [one.name for one in found] == ["b+pool", "b+mlp", "a+pool", "a+mlp"]
    assert found[2].model["encoder"] == str(tower) and found[2].model["projector"] == "pool"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"encoder": {"a": "a"}}, "unknown key 'encoder' (did you mean 'encoders'?)"),
        ({"encoders": {"a": {"encoder": "a", "decoder": "gemma"}}}, "encoders.a: `decoder` is held fixed"),
        ({"encoders": {"a": {"image_size": 28}}}, "encoders.a: `encoder` is missing"),
        ({"encoders": {"a/b": "a"}}, "name 'a/b'"),
        (
            {"encoders": {"a": {"encoder": "a", "imag_size": 28}}},
            "unknown key 'imag_size' (did you mean 'image_size'?)",
        ),
        ({"tasks": {"words": {"data": "data/test.jsonl", "metrics": ["exact_mach"]}}}, "unknown metric 'exact_mach'"),
        ({"tasks": {"words": {"data": "data/none.jsonl"}}}, "none.jsonl: cannot read"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"run": {"model": {}, "data": {"train": "x"}}}, "run.model: `decoder` is missing"),
        ({"probes": {"train": "data/test.jsonl", "test": "data/labelled.jsonl"}}, "'label'"),
        (
            {"probes": {"train": "data/labelled.jsonl", "test": "data/labelled.jsonl", "templates": ["a photo"]}},
            "probes: templates need the place of the class, {}",
        ),
        (
            {"probes": {"train": "data/one_class.jsonl", "test": "data/labelled.jsonl"}},
            "probes: all 7 training images have the label 'red'",
        ),
    ],
)
def test_refusals(changes: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "gemma", "data"):
        (tmp_path / name).symlink_to(comparetools.world() / name)
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(comparetools.settings(**changes)))
    assert main(["compare", "--config", str(path), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.out == "" and "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--encoders", "c"], "encoder 'c' is neither under `encoders` (a, b) nor a checkpoint"),
        (["--projectors", "lineer"], "unknown projector 'lineer' (did you mean 'linear'?)"),
        (["--match", "pixels"], "invalid choice: 'pixels'"),
        (["--jobs", "0"], "expected at least 1, got 0"),
        (["--seeds", "-1"], "expected at least 0"),
        (["--set", "run.seed=3"], "run: leave `seed` out"),
        (["--set", "run.data.max_num_patches=4"], "run.data.max_num_patches would train towers on other numbers"),
        (
            ["--match", "none", "--set", "run.data.max_num_patches=4"],
            "NaFlex towers, and a+linear, b+linear read squares",
        ),
        (["--set", "run.stages.0.steps=many"], "stages.0.steps: expected a whole number"),
    ],
)
def test_refusals_of_options(words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(comparetools.world() / "compare.yaml")
    assert main(["compare", "--config", config, "--out", str(tmp_path / "out"), *words]) == 2
    assert says in capsys.readouterr().err


def test_an_encoder_of_ones_own_is_known_before_anything_is_planned(tmp_path: Path) -> None:
    config = load_config(comparetools.world() / "compare.yaml")
    with pytest.raises(ConfigError, match="no_such_module.*cannot be imported"):
        compare(config, tmp_path / "out", encoder_class="no_such_module:Tower")


def test_the_example_is_one() -> None:
    config = load_config(Path(__file__).parent.parent / "examples" / "compare.yaml")
    arms = make_arms(config)
    assert len(arms) == len(config.encoders) * len(config.projectors) == 10
    for found in arms:
        run_config(config, found, config.seeds[0], Path("out"))
    for task in config.tasks.values():
        registry.expand(task.metrics)


def test_plan_shows_the_match_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(comparetools.world() / "compare.yaml")
    assert main(["compare", "--config", config, "--out", str(tmp_path / "out"), "--plan", "--set", "tokens=9"]) == 0
    told = capsys.readouterr().out
    assert "image size 28 -> 42 px" in told and "4 runs: seeds 0, 1" in told
    assert not (tmp_path / "out").exists()


def test_a_system_without_fork_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "fork")
    with pytest.raises(ConfigError, match=r"vlm compare .* fork.* WSL"):
        processes.Server()


def test_a_server_that_was_killed_is_one_sentence_and_its_end_is_quiet() -> None:
    """A broken pipe in `close` would hide the sentence, and make the command end as if its reader had gone."""
    with pytest.raises(TrainingError, match="the process that starts the runs has died"), processes.serving() as server:
        server._process.kill()
        server._process.wait()
        server.send(stop=["a run"])
