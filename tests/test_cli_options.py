"""Options from dataclasses: each stands once, in a field; what a parser knows and a command gets follows from it."""

import dataclasses
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vlm
from vlm import cli
from vlm.cli import main
from vlm.cli.options import Parser, add_options, chosen_of, filled
from vlm.errors import ConfigError
from vlm.settings import option

COMMANDS = cli.known()


@dataclass(frozen=True, kw_only=True)
class Inner:
    """What lies inside."""

    depth: int = option("how deep", default=3, least=1, metavar="N")
    kind: Literal["a", "b"] = option("which", default="a")

    def __post_init__(self) -> None:
        if self.depth > 9:
            raise ConfigError(f"depth is {self.depth}, expected at most 9")


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    name: str = option("what it is called", flags=("-n",))
    from_: str | None = option("a word of Python", default=None)
    files: list[Path] = option("files", default=(), place=True, metavar="FILE", shown="")
    fast: bool = option("no waiting", default=False)
    secret: int = 7


def parsed(cls: Any, *words: str) -> Any:
    parser = Parser(prog="vlm test")
    add_options(parser, cls)
    return filled(cls, parser.parse_args(list(words)))


def test_fields_become_options_and_options_fill_fields() -> None:
    assert parsed(Outer, "--name", "x") == Outer(name="x", inner=Inner())
    found = parsed(Outer, "f", "g", "-n", "x", "--from", "y", "--depth", "4", "--kind", "b", "--fast")
    wanted = Outer(name="x", inner=Inner(depth=4, kind="b"), from_="y", files=[Path("f"), Path("g")], fast=True)
    assert found == wanted


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "required: --name"),
        (["--name", "x", "--depth", "0"], "expected at least 1, got 0"),
        (["--name", "x", "--kind", "c"], "invalid choice: 'c'"),
        (["--name", "x", "--secret", "1"], "unrecognized arguments: --secret"),
    ],
)
def test_what_a_field_says_is_checked(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parsed(Outer, *words)
    assert end.value.code == 2 and says in capsys.readouterr().err


def test_the_rules_of_a_dataclass_are_those_of_its_options() -> None:
    with pytest.raises(ConfigError, match="depth is 10, expected at most 9"):
        parsed(Outer, "--name", "x", "--depth", "10")


def test_help_has_headings_and_defaults() -> None:
    parser = Parser(prog="vlm test")
    add_options(parser, Outer)
    text = parser.format_help()
    assert "What lies inside:\n  --depth N" in text and "how deep (3)" in text and "which (a)" in text


def test_an_option_that_stands_twice_is_refused() -> None:
    twice = dataclasses.make_dataclass("Twice", [("inner", Inner), ("depth", int, option("again", default=1))])
    with pytest.raises(TypeError, match="depth"):
        add_options(Parser(prog="x"), twice)


def test_some_options_of_another_dataclass() -> None:
    some = chosen_of(Inner, "depth")
    assert parsed(some).depth == 3 and not hasattr(parsed(some), "kind")
    unset = chosen_of(Inner, "depth", unset=True)
    assert parsed(unset).depth is None and parsed(unset, "--depth", "2").depth == 2


# --- the commands -----------------------------------------------------------------------------------------------------


def leaves(cls: Any) -> list[dataclasses.Field[Any]]:
    """The options of a command, those of dataclasses inside it too."""
    found: list[dataclasses.Field[Any]] = []
    for field in dataclasses.fields(cls):
        inner = field.type if dataclasses.is_dataclass(field.type) else None
        found += leaves(inner) if inner else [field]
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_given_is_what_the_fields_say(name: str) -> None:
    """Given only what is required, a command gets the defaults of its dataclasses, whatever the parser thinks."""
    command = COMMANDS[name]
    parser = cli.parser(command)
    words: list[str] = []
    for action in parser.actions():
        if action.required and action.option_strings:
            words += [action.option_strings[0], "1"]
        elif action.required:
            words += [str(next(iter(action.choices or ["1"])))]
    if name == "eval":
        words += ["--metrics", "cider"]
    options: Any = filled(command.options, parser.parse_args(words))

    def check(value: Any) -> None:
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            if dataclasses.is_dataclass(inner):
                check(inner)
            elif field.default is not dataclasses.MISSING and field.name != "metrics":
                assert inner == field.default, field.name

    check(options)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: vlm {name} [-h]")
    for action in cli.parser(COMMANDS[name]).actions():
        assert action.help, action.dest


def test_the_commands_stand_under_headings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    places = [text.index(f"\n    {name} ") for name in COMMANDS]
    assert places == sorted(places) and text.index("build, bring in, hand out:") < text.index("judge a model:")


def completed(*words: str) -> set[str]:
    """What bash offers for the last of these words."""
    script = f"""
eval "$({sys.executable} -m vlm completion bash)"
COMP_WORDS=({" ".join(f"'{word}'" for word in words)}); COMP_CWORD={len(words) - 1}; _vlm
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_options_and_choices() -> None:
    assert completed("vlm", "") == {name for name in COMMANDS if " " not in name} | {"help"}
    assert completed("vlm", "train", "--re") == {"--resume"}
    assert completed("vlm", "export", "--to", "") == {"paligemma", "tower"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_scripts(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert " " in name or command.help.replace("'", "") in script.replace("'", ""), name
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}: the script was made and not read by its shell")
    path = tmp_path / "script"
    path.write_text(script)
    subprocess.run([shell, "-n", str(path)], check=True)
    if shell == "fish":
        asked = f'source {path}; complete -C "vlm export --to "'
        done = subprocess.run([shell, "-c", asked], capture_output=True, text=True, check=True)
        assert {line.split("\t")[0] for line in done.stdout.splitlines()} == {"paligemma", "tower"}


# --- debug ------------------------------------------------------------------------------------------------------------


def test_debug_dumps_what_the_model_computes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vlm.build import presets

    network, processor = presets.tiny()
    vlm.save(network, processor, tmp_path / "m")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    words = ["debug", str(tmp_path / "red.png"), "-m", str(tmp_path / "m"), "--suffix", "a square"]
    assert main([*words, "--dump", str(tmp_path / "d.safetensors")]) == 0
    found = load_file(tmp_path / "d.safetensors")
    batch = processor([tmp_path / "red.png"], ["caption en"], ["a square"])
    network.eval()
    with torch.no_grad():
        features = network.encode(batch["pixel_values"])
        tokens, _ = network.model.project(features)
        out = network(**batch, skip_logits=False)
        states = network(**batch, skip_logits=False, output_hidden_states=True).hidden_states
    assert torch.equal(found["batch.labels"], batch["labels"])
    assert torch.equal(found["model.vision_tower"], features.features)
    assert torch.equal(found["model.multi_modal_projector"].flatten(0, 1), tokens)
    assert torch.equal(found["model.language_model.layers.0"], states[1])
    assert torch.equal(found["logits"], out.logits) and torch.equal(found["loss"], out.loss)
    # Images and prefix see each other, the suffix looks back: of the last row, everything; of the first, no suffix.
    seen = found["mask"][0, 0] == 0
    suffix = int((batch["token_type_ids"] == 1).sum())
    assert seen[-1].all() and seen[0].sum() == seen.shape[0] - suffix
    shown = capsys.readouterr().out
    assert all(name in shown for name in found)


def test_a_list_given_twice_is_the_last_one_but_for_settings() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Lists:
        seeds: list[int] = option("numbers", default=())
        set: list[str] = option("settings", default=(), repeats=True)

    found = parsed(Lists, "--seeds", "1", "2", "--seeds", "3", "--set", "a=1", "--set", "b=2", "c=3")
    assert found.seeds == [3] and found.set == ["a=1", "b=2", "c=3"]


@pytest.mark.parametrize("name", COMMANDS)
def test_headings_are_short_and_no_empty_default_is_told(name: str) -> None:
    parser = cli.parser(COMMANDS[name])
    text = parser.format_help()
    assert "(())" not in text and "([])" not in text
    headings = [group.title or "" for group in parser._action_groups]
    assert len(headings) > 2 and all(0 < len(title) < 40 and "`" not in title for title in headings), headings


def test_a_full_disk_behind_a_dump_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors writes in Rust, and has an error of its own for a full disk."""
    from safetensors import SafetensorError

    from vlm.build import presets

    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    network, processor = presets.tiny()
    vlm.save(network, processor, tmp_path / "m")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert main(["debug", "-m", str(tmp_path / "m"), "--dump", str(tmp_path / "d.safetensors")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ") and "d.safetensors" in said[-1] and "No space left" in said[-1]
    assert not (tmp_path / "d.safetensors").exists()
