"""What the documents promise: every command and option that they name exists, every link leads somewhere, every name
of the Python examples is there, and the tables say what the code says."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vlm import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def command_lines(page: Path) -> list[list[str]]:
    """The words after `vlm` of every command line in a page's blocks, comments and `...` left out."""
    found = []
    for line in text_of(page).splitlines():
        line = line.strip().removeprefix("# ").removeprefix("./run ")
        for part in re.split(r"&&", line.split("  #")[0]):
            match = re.match(
                r"(?:[A-Z_]+=\S+ )?(?:vlm|(?:torchrun|accelerate launch) .*?-m vlm|python -m vlm) (.*)", part.strip()
            )
            if match and (
                line.startswith(("vlm ", "torchrun", "accelerate", "python", "PYTHONPATH")) or part is not line
            ):
                found.append(shlex.split(match[1]))
    return found


def inline_commands(page: Path) -> list[list[str]]:
    """`vlm ...` between backquotes; not in Python, where an example may be a command that is yet to be added."""
    text = re.sub(r"^```python\n.*?^```", "", text_of(page), flags=re.M | re.S)
    spans = re.findall(r"`(vlm [a-z-]+[^`\n]*)`", text)
    return [span.split()[1:] for span in spans if not span.startswith("vlm ...")]


def refusal(words: list[str]) -> str:
    """What the parsers say against these words, "" when nothing."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.parse(words)
        except SystemExit as end:
            return said.getvalue() if end.code else ""
    return ""


@each_page
def test_commands_and_options_exist(page: Path) -> None:
    for words in command_lines(page):
        values = {number for number, word in enumerate(words, 1) if word.startswith("--")}
        whole = ["X" if word == "..." and number in values else word for number, word in enumerate(words)]
        whole = [word for word in whole if word != "..."]
        said = refusal(whole)
        if "..." in words:  # it stands for what a reader has to add
            said = "" if "are required" in said or "is required" in said else said
        assert said == "", f"{page.name}: vlm {' '.join(words)}\n{said}"
    for words in inline_commands(page):
        said = refusal(words)
        incomplete = ("are required", "is required", "expected one argument", "expected at least one argument")
        assert said == "" or any(text in said for text in incomplete), f"{page.name}: vlm {' '.join(words)}\n{said}"


def test_the_reader_sees_the_commands() -> None:
    """Guards the test above against a reader that finds nothing."""
    assert len(command_lines(ROOT / "README.md")) >= 13
    assert sum(len(command_lines(page)) + len(inline_commands(page)) for page in PAGES) > 90
    assert ["eval", "--model"] == command_lines(ROOT / "docs" / "evaluation.md")[3][:2]  # behind torchrun
    assert "unknown command" in refusal(["evl"]) and "unrecognized" in refusal(["info", "m", "--jsn"])


@each_page
def test_options_in_the_text_exist(page: Path) -> None:
    options = {name for one in cli.known().values() for name in cli.parser(one).option_names} | {"--version"}
    # Of other programs: pip, torchrun, vLLM, lmms-eval, VLMEvalKit, the benchmarks and pytest.
    others = {
        "--require-hashes",
        "--no-deps",
        "--cpu",
        "--num_processes",
        "--multi_gpu",
        "--nproc_per_node",
        "--nnodes",
    }
    others |= {"--dtype", "--max-model-len", "--max-num-batched-tokens", "--model_args", "--tasks", "--batch_size"}
    others |= {"--size", "--help"}
    named = set(re.findall(r"`(--[a-z][a-z-_]*)", text_of(page)))
    assert named - options - others == set()


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        name, _, anchor = target.partition("#")
        if name.startswith(("http://", "https://")):
            continue
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", text_of(path), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            anchors |= set(re.findall(r'<a name="([^"]+)"', text_of(path)))
            assert anchor in anchors, f"{page.name}: {target}"


def paths_of(text: str) -> set[str]:
    """Files and folders of the repository that a text names, in backquotes or in a drawing."""
    found = set(
        re.findall(r"(?<![\w/.])(?:vlm|tests|scripts|benchmarks|examples|docs)/[\w/]*\w\.(?:py|ya?ml|md)\b", text)
    )
    return found | set(re.findall(r"`((?:vlm|tests|scripts|benchmarks|examples|docs)/[\w/.-]*)`", text))


def names_of(text: str) -> set[str]:
    """Dotted names of the package in backquotes, without what they are called with."""
    return set(re.findall(r"`(vlm(?:\.[A-Za-z_]\w*)+)", text))


def missing(dotted: str) -> bool:
    value: object = importlib.import_module("vlm")
    names = dotted.split(".")[1:]
    for depth, name in enumerate(names, 1):
        with contextlib.suppress(ImportError):
            importlib.import_module(".".join(["vlm", *names[:depth]]))
        if not hasattr(value, name):
            return True
        value = getattr(value, name)
    return False


@each_page
def test_paths_and_names_are_there(page: Path) -> None:
    if page.name == "log.md":
        pytest.skip("it tells of what was")
    # Blocks are programs, and on the page of additions they are the files that are yet to be.
    text = re.sub(r"^```\w*\n.*?^```", "", text_of(page), flags=re.M | re.S)
    paths = {path.replace("NAME.py", "").replace("NAME.yaml", "") for path in paths_of(text)}
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []
    assert sorted(filter(missing, names_of(text))) == []


def test_the_reader_of_paths_and_names_finds_them() -> None:
    text = (
        "`vlm/model/forward.py`, `vlm/train`,\n    vlm/model/gone.py  `vlm.gone.x(1)` `vlm.model.masks`, user/vlm/x.py"
    )
    assert paths_of(text) == {"vlm/model/forward.py", "vlm/train", "vlm/model/gone.py"}
    assert names_of(text) == {"vlm.gone.x", "vlm.model.masks"}
    assert missing("vlm.gone.x") and missing("vlm.model.masks.gone") and not missing("vlm.model.masks.additive")
    assert len(paths_of(text_of(ROOT / "docs" / "design.md"))) > 30


@each_page
def test_python_examples_name_what_is_there(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", text_of(page), re.M | re.S):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vlm":
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page.name}: {node.module}.{alias.name}"
            elif isinstance(node, ast.Attribute):
                names = ast.unparse(node).split(".")
                if names[0] == "vlm" and all(name.isidentifier() for name in names):
                    value = importlib.import_module("vlm")
                    for depth, name in enumerate(names[1:], 1):
                        with contextlib.suppress(ImportError):
                            importlib.import_module(".".join(names[: depth + 1]))
                        assert hasattr(value, name), f"{page.name}: {'.'.join(names)}"
                        value = getattr(value, name)


def test_the_comparison_of_the_readme_names_encoders_of_its_file() -> None:
    for page in PAGES:
        for words in command_lines(page):
            file = ROOT / words[words.index("--config") + 1] if words[0] == "compare" and "--config" in words else None
            if file is not None and file.exists() and "--encoders" in words:
                from vlm.compare.config import load_config

                known = set(yaml.safe_load(file.read_text(encoding="utf-8"))["encoders"])
                options = cli.parse(words)[1]
                assert set(options.encoders) <= known, f"{page.name}: {' '.join(words)}"
                assert load_config(file, []).seeds


def test_a_metric_is_one_file(tmp_path: Path) -> None:
    """The example of docs/evaluation.md, put beside the other metrics: found by name, listed, computed."""
    shutil.copytree(ROOT / "vlm" / "eval" / "metrics", tmp_path / "metrics")
    (block,) = (
        b for b in re.findall(r"```python\n(.*?)```", text_of(ROOT / "docs" / "evaluation.md"), re.S) if "@reg" in b
    )
    (tmp_path / "metrics" / "words.py").write_text(block, encoding="utf-8")
    code = f"""
import vlm.eval
vlm.eval.__path__.insert(0, {str(tmp_path)!r})
from vlm.cli import main
from vlm.eval import metrics
print(metrics.compute("mean_words", {{"1": "a red cat"}}, {{"1": ("a",)}}).value)
raise SystemExit(main(["score", "--list"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3.0\n") and "\nmean_words " in done.stdout and "\ncider " in done.stdout


def test_the_loop_of_ones_own_runs_and_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("lightning_loop")
    first, last = (example.main(epochs) for epochs in (1, 8))
    assert set(first) == {"loss", "val_loss"}
    assert last["val_loss"] < 0.5 * first["val_loss"] and last["loss"] < 0.5 * first["loss"]


def test_exit_codes_are_told_where_they_are_promised() -> None:
    from vlm import children
    from vlm.cli import console

    codes = {console.OK, console.FAILED, children.REFUSED, console.SKIPPED, children.INTERRUPTED, children.TERMINATED}
    told = {int(code) for code in re.findall(r"(?:^  |/)(\d+)", cli.EXIT_CODES, re.M)}
    assert told == codes == {int(code) for code in re.findall(r"^ +(\d+) {2,}", console.__doc__ or "", re.M)} | {143}
