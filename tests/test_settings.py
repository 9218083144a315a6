import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from vlm import settings
from vlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    steps: int = 10
    train: list[Literal["encoder", "projector", "decoder"]] = field(default_factory=list)
    optimizer: Optimizer = Optimizer(lr=0.5, clip=7.0)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must be 0 or more, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class Run:
    out: Path
    stages: tuple[Stage, ...] = ()
    rates: dict[str, float] = field(default_factory=dict)
    size: int | Literal["auto"] = "auto"
    best: Optimizer | None = None
    extra: Any = None
    fast: bool = False


def make(**values: Any) -> Run:
    return settings.from_dict(Run, {"out": "runs/a", **values})


def test_every_kind_of_field_is_read() -> None:
    run = make(
        stages=[{"name": "align", "train": ["projector"], "optimizer": {"lr": 1}}],
        rates={"encoder": 1e-5},
        size=224,
        best={"lr": 0.1, "betas": [0.8, 0.9]},
        extra={"any": [1, None]},
        fast=True,
    )
    stage = Stage(name="align", train=["projector"], optimizer=Optimizer(lr=1.0, clip=7.0))
    assert run == Run(
        out=Path("runs/a"),
        stages=(stage,),
        rates={"encoder": 1e-5},
        size=224,
        best=Optimizer(lr=0.1, betas=(0.8, 0.9)),
        extra={"any": [1, None]},
        fast=True,
    )
    assert type(run.stages[0].optimizer.lr) is float


def test_a_partial_mapping_keeps_the_rest_of_the_fields_default() -> None:
    assert make(stages=[{"name": "a", "optimizer": {"betas": [0.5, 0.6]}}]).stages[0].optimizer == Optimizer(
        lr=0.5, betas=(0.5, 0.6), clip=7.0
    )


def test_round_trip() -> None:
    run = make(stages=[{"name": "a"}], best={"lr": 3}, size="auto", rates={"x": 2})
    plain = settings.to_dict(run)
    assert plain["out"] == "runs/a" and plain["stages"][0]["optimizer"]["betas"] == [0.9, 0.95]
    assert settings.from_dict(Run, plain) == run


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stagse": []}, r"config: unknown key 'stagse' \(did you mean 'stages'\?\); known: out, stages"),
        ({"stages": [{}]}, r"config: stages\.0: key 'name' is missing; expected text"),
        ({"stages": [{"name": "a", "steps": "3"}]}, r"stages\.0\.steps: expected a whole number, got text: '3'"),
        ({"stages": [{"name": "a", "steps": 3.0}]}, r"stages\.0\.steps: expected a whole number"),
        ({"stages": [{"name": "a", "steps": True}]}, r"stages\.0\.steps: expected a whole number, got a boolean"),
        ({"stages": [{"name": "a", "steps": -1}]}, r"stages\.0: steps must be 0 or more, got -1"),
        (
            {"stages": [{"name": "a", "train": ["tower"]}]},
            r"train\.0: expected one of 'encoder', 'projector', 'decoder'",
        ),
        ({"stages": {"name": "a"}}, r"stages: expected a list \(keys and values, \.\.\.\), got keys and values"),
        ({"stages": ["a"]}, r"stages\.0: expected keys and values \(Stage\), got text"),
        ({"stages": [{"name": 3}]}, r"stages\.0\.name: expected text, got a whole number: 3"),
        ({"rates": {"encoder": "fast"}}, r"rates\.encoder: expected a number"),
        ({"rates": {"encoder": float("nan")}}, r"rates\.encoder: expected a number, got a number: nan"),
        ({"rates": {"encoder": True}}, r"rates\.encoder: expected a number, got a boolean"),
        ({"size": "large"}, r"size: expected a whole number or one of 'auto', got text: 'large'"),
        ({"best": {"lr": 1, "beta": 2}}, r"best: unknown key 'beta' \(did you mean 'betas'"),
        ({"best": {"lr": 1, "betas": [1]}}, r"best\.betas: expected 2 values, got 1"),
        ({"fast": 1}, r"fast: expected true or false, got a whole number: 1"),
        ({"fast": None}, r"fast: expected true or false, got nothing \(null\)"),
        ({"out": ""}, r"out: expected a path"),
        ({"out": 3}, r"out: expected a path, got a whole number"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**values)


def test_an_unsupported_field_type_is_our_bug_not_the_users() -> None:
    bad = dataclasses.make_dataclass("Bad", [("when", complex)])
    with pytest.raises(TypeError, match="complex"):
        settings.from_dict(bad, {"when": 1})


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_load_applies_overrides_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "out: a\nstages:\n- {name: one, steps: 1}\n- {name: two}\n")
    overrides = [
        "stages.0.steps=3",
        "stages.1.optimizer.lr=1e-4",
        "best.lr=2",
        "rates.encoder=1",
        "rates.encoder=.5",
        "size=96",
    ]
    run = settings.load(Run, path, overrides)
    assert [stage.steps for stage in run.stages] == [3, 10]
    assert run.stages[1].optimizer == Optimizer(lr=1e-4, clip=7.0)
    assert (run.best, run.rates, run.size) == (Optimizer(lr=2.0), {"encoder": 0.5}, 96)
    assert settings.load(Run, path, ["stages=[]", "best=null"]).stages == ()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fast", "override 'fast': expected NAME=VALUE"),
        ("=3", "expected NAME=VALUE"),
        ("stages..name=3", "expected NAME=VALUE"),
        ("stages.2.steps=3", "stages is a list of 1; expected an index from 0 to 0, got '2'"),
        ("stages.-1.steps=3", "expected an index from 0 to 0, got '-1'"),
        ("out.name=3", "out is text: 'a' and has no 'name' inside"),
        ("stages.0.stesp=3", r"run.yaml: stages.0: unknown key 'stesp' \(did you mean 'steps'\?"),
        ("fast=no", "fast: expected true or false, got text: 'no'"),
        ("fast=[", r"override 'fast=\[':1: not valid YAML"),
    ],
)
def test_a_wrong_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.load(Run, write(tmp_path, "out: a\nstages: [{name: one}]\n"), [override])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3E5", 3e5),
        (".5", 0.5),
        ("-1.", -1.0),
        ("12", 12),
        ("-7", -7),
        ("10_000", 10000),
        ("010", 10.0),  # never octal 8; a float, which whole-number fields refuse
        ("12:30", "12:30"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("2026-01-02", "2026-01-02"),
        ("'3'", "3"),
        ("e5", "e5"),
        ("{a: &x {b: 1}, c: {<<: *x, d: 2}}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
    ],
)
def test_yaml_scalars_without_surprises(text: str, value: object) -> None:
    got = settings.parse_yaml(text, "test")
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", r"run\.yaml:2: not valid YAML: key 'a' is given twice"),
        ("a: [1,\nb: }", r"run\.yaml:2: not valid YAML"),
        ("- 1\n", "expected `key: value` lines at the top, got a list"),
        ("just text", "expected `key: value` lines at the top, got text"),
        ("out: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("out: " + "9" * 6000, "not valid YAML"),
        ("out: !!bool x", "not valid YAML"),
        ("out: " + "[" * 5000, "not valid YAML"),
        ("out: \0", "not valid YAML"),
        (b"out: \xff", r"not UTF-8 text \(invalid start byte at byte 5\)"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.load(Run, write(tmp_path, text))


def test_an_empty_file_is_an_empty_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="key 'out' is missing"):
        settings.load(Run, write(tmp_path, "# nothing yet\n"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot read the configuration: No such file"):
        settings.load(Run, tmp_path / "nowhere.yaml")
