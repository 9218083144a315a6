import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlm
from vlm import children
from vlm.cli import main
from vlm.errors import ConfigError, DataError

COMMANDS = ("new", "train", "eval", "compare", "caption", "ask", "info", "demo", "version")
HEAVY = ("torch", "transformers", "lightning", "numpy", "PIL", "rich", "yaml")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a tiny random model."""
    import vlm

    folder = tmp_path_factory.mktemp("model")
    net, processor = vlm.build.presets.tiny()
    vlm.save(net, processor, folder)
    return str(folder)


@pytest.fixture
def images(tmp_path: Path) -> dict[str, str]:
    """Paths by name: two good images and two bad ones."""
    paths = {name: str(tmp_path / f"{name}.png") for name in ("red", "blue", "text", "gone")}
    for name in ("red", "blue"):
        Image.new("RGB", (40, 30), name).save(paths[name])
    Path(paths["text"]).write_text("not an image")
    return paths


def run_python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, **options)


# --- help and misuse


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["eval", "diff", "--help"], *([name, "--help"] for name in COMMANDS)]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"""
import sys
from vlm.cli import main
rc = main({words!r})
print(rc, [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    done = run_python(code)
    assert done.stdout.startswith(f"usage: vlm {' '.join(words).removesuffix('--help')}".rstrip())
    assert done.stderr.strip() == "0 []"


def test_python_m_vlm_lists_the_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "vlm", "--help"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert all(f"    {name}" in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], "unknown command: trian (did you mean 'train'?)"),
        (["help", "chek"], "unknown command: chek (did you mean 'check'?)"),
        (["evaluate"], "unknown command: evaluate (did you mean 'eval'?)"),
        (["--verison"], "unrecognized arguments: --verison (did you mean '--version'?)"),
        (["eval", "dif", "a", "b"], "vlm eval takes no 'dif' (did you mean 'diff'?)"),
        (["train"], "required: --config"),
        (["train", "--config", "a.yaml", "--resum"], "unrecognized arguments: --resum (did you mean '--resume'?)"),
        (["train", "--confg=a.yaml"], "unrecognized arguments: --confg (did you mean '--config'?)"),
        (["eval", "diff", "a", "b", "--htm", "x"], "unrecognized arguments: --htm (did you mean '--html'?)"),
        (["caption", "a.png", "-model", "m"], "unrecognized arguments: -model (did you mean '--model'?)"),
        (["info", "m", "n"], "unrecognized arguments: n"),
        (["eval", "--model", "m"], "required: --data/-d, --out/-o"),
        (["caption", "--model", "m"], "required: IMAGE"),
        (["caption", "a.png"], "required: --model"),
        (["caption", "a.png", "--model", "m", "--max-new-tokens", "0"], "expected at least 1, got 0"),
        (["caption", "a.png", "--model", "m", "--batch-size", "many"], "expected a whole number, got 'many'"),
        (["caption", "a.png", "--model", "m", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["demo", "--seed", "-1"], "expected at least 0, got -1"),
    ],
)
def test_misuse_is_two_lines_on_stderr(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second = captured.err.splitlines()
    assert first.startswith("error: ") and says in first
    command = words[0] if words[0] in COMMANDS else ""
    assert second == f"See `{f'vlm {command}'.strip()}{' diff' if 'diff' in words else ''} --help`."


def test_help_and_version_as_people_ask_for_them(capsys: pytest.CaptureFixture[str]) -> None:
    import vlm

    def said(*words: str) -> str:
        assert main(words) == 0
        return capsys.readouterr().out

    assert said("--version") == f"vlm {vlm.__version__}\n"
    assert said("help") == said("--help") == said()
    assert said("help", "caption") == said("caption", "--help")
    assert said("help", "eval", "diff") == said("eval", "diff", "--help")


def test_a_question_that_looks_like_an_option_is_a_question(
    images: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", images["gone"], "--what is it?", "--model", "m"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_version_names_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    import vlm

    assert main(["version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"vlm {vlm.__version__}" and f"torch {torch.__version__}" in lines


# --- endings


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ConfigError("key 'a' is unknown"), 2, "error: key 'a' is unknown\n"),
        (DataError("2 problems:\na:1\na:2"), 2, "error: 2 problems:\na:1\na:2\n"),
        (OSError(28, "No space left on device", "/full"), 2, "error: [Errno 28] No space left on device: '/full'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(143), 143, ""),
        (MemoryError(), 2, "error: out of memory; take smaller batches or images, or a smaller model\n"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes\nat frame 3"),
            2,
            "error: out of memory ([enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes); take"
            " smaller batches or images, or a smaller model\n",
        ),
    ],
)
def test_how_a_command_ends(error: BaseException, code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, children.endings():
        raise error
    assert (caught.value.code, capsys.readouterr().err) == (code, says)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), children.endings():
        print(1 / 0)


def test_logging_is_on_stderr_and_only_during_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    logger = logging.getLogger("vlm.some.module")
    before = logging.getLogger("vlm").handlers[:], signal.getsignal(signal.SIGTERM)
    with children.endings():
        logger.info("step 1")
        logger.warning("slow")
        logger.debug("detail")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "step 1\nwarning: slow\n")
    assert (logging.getLogger("vlm").handlers, signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_their_code_and_run_finally(signum: int, code: int) -> None:
    code_text = f"""
import os, sys
from vlm import children
try:
    with children.endings():
        try:
            os.kill(os.getpid(), {int(signum)})
            for _ in range(10**9): pass
        finally:
            print("cleaned up")
except SystemExit as end:
    sys.exit(end.code)
"""
    done = run_python(code_text)
    assert (done.returncode, done.stdout) == (code, "cleaned up\n")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("turned", ["ImportError", "SystemError", None])
@pytest.mark.parametrize("command", ["info", "train"])
def test_a_signal_while_a_library_is_imported_ends_in_one_line(
    name: str, code: int, turned: str | None, command: str, tmp_path: Path
) -> None:
    """Compiled libraries turn an exception that falls into their import into another one, or let it through."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\n"
        "try:\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    time.sleep(9)\n"
        "except BaseException as error:\n"
        f"    raise {turned or 'error'}('multiarray failed to import')\n"
        if turned
        else f"import os, signal, time\nos.kill(os.getpid(), signal.{name})\ntime.sleep(9)\n"
    )
    (tmp_path / "run.yaml").write_text(
        f"{{out: {tmp_path / 'out'}, model: {{path: m}}, data: {{train: d}}, stages: [{{name: a, module: full, train:"
        " {decoder: 0.1}, steps: 1, batch_size: 1}]}"
    )
    words = {"info": ["info", "m"], "train": ["train", "-c", str(tmp_path / "run.yaml")]}[command]
    path = os.pathsep.join([str(tmp_path), str(Path(vlm.__file__).parent.parent)])
    done = run_python(
        f"import sys; from vlm.cli import main; sys.exit(main({words!r}))", env={**os.environ, "PYTHONPATH": path}
    )
    said = {"SIGINT": "interrupted\n", "SIGTERM": "terminated\n"}[name]
    if command == "train":
        said = "warning: stopped; no step was trained, and nothing is saved\n"
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)
    assert not (tmp_path / "out").exists()


def test_a_reader_that_leaves_is_no_error() -> None:
    code = "from vlm import children\nwith children.endings():\n    while True: print('x' * 1000)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.read(10)
    process.stdout.close()
    assert (process.wait(300), process.stderr.read()) == (0, b"")
    process.stderr.close()


@pytest.mark.parametrize("words", [["version"], ["--help"], ["score", "--list"], ["eval", "--list-tasks"]])
def test_a_reader_that_never_reads_is_no_error(words: list[str]) -> None:
    """Output that fits into the buffer meets the closed pipe only at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "vlm", *words], stdout=writer, stderr=subprocess.PIPE, timeout=300)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_stdout_or_stderr_ends_in_2() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "vlm"]
        done = subprocess.run([*command, "version"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (2, "error: [Errno 28] No space left on device\n")
        done = subprocess.run([*command, "info", "/nix"], stdout=subprocess.PIPE, stderr=full, text=True, timeout=300)
        assert (done.returncode, done.stdout) == (2, "")


def test_what_the_terminal_cannot_show_is_escaped() -> None:
    code = "from vlm import children\nwith children.endings(): print('Stra\\xdfe \\u732b \\udcff')"
    done = run_python(code, env={**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}, encoding="latin-1")
    assert (done.returncode, done.stdout) == (0, "Straße \\u732b \\udcff\n")


# --- caption and ask


def test_caption_prints_what_generate_gives(
    model: str, images: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    import vlm

    net, processor = vlm.load(model)
    paths = [images["red"], images["blue"]]
    expected = vlm.generate(net, processor, paths, ["ocr"] * 2, max_new_tokens=6)
    options = ["--model", model, "--prompt", "ocr", "--max-new-tokens", "6", "--device", "cpu", "--batch-size", "1"]
    assert main(["caption", *paths, *options, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert records == [
        {"image": p, "prompt": "ocr", "text": t, "finish": t.finish} for p, t in zip(paths, expected, strict=True)
    ]
    assert main(["caption", *paths, *options]) == 0
    one_line = [" ".join(text.split()) for text in expected]
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [f"{p}: {t}" for p, t in zip(paths, one_line, strict=True)]
    cut = [f"{p}: cut after 6 tokens (--max-new-tokens)" for p in paths]
    assert captured.err.splitlines() == cut and {t.finish for t in expected} == {"length"}
    assert main(["caption", paths[0], *options]) == 0
    assert capsys.readouterr().out == one_line[0] + "\n"


def test_ask_asks_in_the_models_words(model: str, images: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    import vlm

    net, processor = vlm.load(model)
    prompt = "answer en what colour?"
    (expected,) = vlm.generate(net, processor, [images["red"]], [prompt], max_new_tokens=5, num_beams=2)
    options = ["--model", model, "--max-new-tokens", "5", "--num-beams", "2", "--json", "--dtype", "float32"]
    assert main(["ask", images["red"], "what colour?", *options]) == 0
    answer = {"image": images["red"], "prompt": prompt, "text": expected, "finish": expected.finish}
    assert json.loads(capsys.readouterr().out) == answer


def test_the_rule_of_the_beams_reaches_the_search(
    model: str, images: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    import vlm

    net, processor = vlm.load(model)
    rules: Any = ("big_vision", "transformers")
    args: Any = net, processor, [images["red"]], ["caption en"]
    expected = [vlm.generate(*args, max_new_tokens=5, num_beams=3, beam_search=rule)[0] for rule in rules]
    assert expected[0] != expected[1]
    for rule, text in zip(rules, expected, strict=True):
        options = ["--model", model, "--max-new-tokens", "5", "--num-beams", "3", "--beam-search", rule, "--json"]
        assert main(["caption", images["red"], *options]) == 0
        assert json.loads(capsys.readouterr().out)["text"] == text
    assert main(["caption", images["red"], "--model", model, "--beam-search", "google"]) == 2
    assert "--beam-search: invalid choice: 'google'" in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", ["1", "2", "8"])
def test_bad_images_are_named_and_the_others_described(
    model: str, images: dict[str, str], batch_size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [images[name] for name in ("text", "red", "gone", "blue")]
    words = ["caption", *paths, "--model", model, "--max-new-tokens", "2", "--batch-size", batch_size]
    assert main([*words, "--json"]) == 3
    captured = capsys.readouterr()
    records = [json.loads(line) for line in captured.out.splitlines()]
    assert [record["image"] for record in records] == paths
    assert [record.get("code") for record in records] == ["not-an-image", None, "missing", None]
    assert [set(record) for record in records[:2]] == [
        {"image", "prompt", "error", "code"},
        {"image", "prompt", "text", "finish"},
    ]
    assert "2 of 4 images could not be read" in captured.err
    assert main(words) == 3
    captured = capsys.readouterr()
    assert [line.split(":")[0] for line in captured.out.splitlines()] == [images["red"], images["blue"]]
    assert f"error: missing: {images['gone']}: no such file" in captured.err


def test_only_bad_images_are_refused_without_opening_the_model(
    images: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caption", images["gone"], images["text"], "--model", "/no/such/model"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(":")[1] for line in captured.err.splitlines()[:2]] == [" missing", " not-an-image"]


@pytest.mark.parametrize("words", [["info", "{}"], ["caption", "{red}", "-m", "{}"]])
def test_a_model_that_is_none_is_refused_in_a_line(
    words: list[str], tmp_path: Path, images: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path / "none" / "here", tmp_path):
        assert main([word.format(folder, **images) for word in words]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"error: {folder}: ") and captured.err.count("\n") == 1


def test_info_agrees_with_the_weights(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    import vlm

    net, _ = vlm.load(model)
    total = sum(parameter.numel() for parameter in net.parameters())
    assert main(["info", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == total
    assert main(["info", model]) == 0
    assert f"{total:,}" in capsys.readouterr().out


def test_cuda_where_there_is_none(model: str, images: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main(["caption", images["red"], "--model", model, "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "error: --device cuda: torch finds no CUDA device here; use --device cpu\n"


# --- train and eval


@pytest.fixture
def data(tmp_path: Path, images: dict[str, str]) -> Path:
    lines = [
        {"image": f"{name}.png", "prefix": "answer en what colour?", "suffix": name, "answers": [name]}
        for name in ("red", "blue")
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def config(tmp_path: Path, model: str, data: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
out: {tmp_path / "run"}
model: {{path: {model}}}
data: {{train: {data}}}
seed: 1
stages:
  - {{name: align, module: frozen_encoder, train: {{projector: 1.e-3}}, steps: 2, batch_size: 2}}
"""
    )
    return path


def test_train_then_eval_from_the_command_line(
    config: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", str(config), "--set", "stages.0.steps=1", "seed=3", "--print-config"]) == 0
    import yaml

    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["seed"], shown["stages"][0]["steps"]) == (3, 1)

    assert main(["train", "--config", str(config), "--set", "stages.0.steps=1"]) == 0
    trained = capsys.readouterr().out.strip()
    assert Path(trained, "config.json").is_file()

    assert main(["train", "--config", str(config)]) == 2  # the directory holds a run
    assert capsys.readouterr().err.count("error: ") == 1

    out = tmp_path / "eval"
    words = ["eval", "--model", trained, "--data", str(data), "--metrics", "exact_match", "--out", str(out)]
    assert main([*words, "--max-new-tokens", "2"]) == 0
    assert "exact_match" in capsys.readouterr().out
    assert json.loads((out / "results.json").read_text())["metrics"]["exact_match"]["num_items"] == 2


def test_skipped_annotations_end_in_3(
    config: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with data.open("a") as file:
        file.write('{"image": "nowhere.png", "prefix": "p", "suffix": "s"}\n')
    words = ["train", "--config", str(config), "--set", "stages.0.steps=1"]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert f"error: {data}:3: missing-image: image nowhere.png is not below" in captured.err
    assert main([*words, f"out={tmp_path / 'other'}", "--skip-bad"]) == 3
    captured = capsys.readouterr()
    assert f"{data}:3: missing-image" in captured.err
    assert captured.out.strip() == str(tmp_path / "other" / "model")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("stagse=[]", "unknown key 'stagse' (did you mean 'stages'?)"),
        ("stages.0.steps=many", "stages.0.steps: expected a whole number or null, got text: 'many'"),
        ("stages.7.steps=1", "stages is a list of 1; expected an index from 0 to 0, got '7'"),
    ],
)
def test_a_wrong_setting_is_refused(config: Path, change: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(config), "--set", change]) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.out == ""


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `vlm` in a process of its own and ends it with the test."""
    processes = []

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "vlm", *words]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_terminated_run_saves_and_ends_in_143(
    config: Path, tmp_path: Path, spawn: Callable[..., subprocess.Popen[str]]
) -> None:
    words = ["train", "--config", str(config), "--set", "stages.0.steps=100000", "checkpoint_every=100000"]
    process = spawn(*words)
    metrics = tmp_path / "run" / "metrics.csv"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (143, ""), err
    assert "Traceback" not in err
    (saved,) = (tmp_path / "run" / "align" / "checkpoints").iterdir()
    assert f"warning: stopped; saved: {saved}\n" in err
    command = err.splitlines()[-1].removeprefix("to go on: ")
    assert command.endswith(" ".join(words[2:]) + " --resume") and "-m vlm train --config" in command
