"""The house: which room imports which, how long the chains are, what stands where. `scripts/house.py` reads it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import house  # noqa: E402

HOUSE = house.House()
OWN = HOUSE.own()
OUTSIDE = [
    found
    for found in HOUSE.imports
    if found.imported.split(".")[0] not in {house.PACKAGE, "__future__", *sys.stdlib_module_names}
]

# These numbers may only fall.
MAX_CHAIN_BY_FILE = 12
MAX_CHAIN_BY_ROOM = 8
MAX_TOP = 10
MAX_SHARE = 0.16

# What each layer may take from outside the standard library, beyond what the layers below may.
THIRD_PARTY: tuple[set[str], ...] = (
    {"numpy", "yaml", "torch", "psutil"},
    {"transformers", "PIL", "sentencepiece"},
    set(),
    set(),
    {"safetensors", "accelerate", "huggingface_hub", "tokenizers", "rich"},
    {"lightning", "rapidfuzz"},
    set(),
)
# Installed only on request: imported in functions, never when a module is imported.
DYNAMIC_IMPORTS = {"vlm.registry", "vlm.encoders", "vlm.eval.metrics", "vlm.data.benchmarks"}
"""Only these import a module whose name they compute; each looks it up in a list of our own names first."""
OPTIONAL = {"tensorboard", "timm", "open_clip", "pycocoevalcap", "datasets", "lmms_eval", "faiss", "usearch"}
# Take seconds or show up in every start: imported in functions wherever a light module leads to them.
LATE = OPTIONAL | {"rich"}
# (importer, imported) that the table of rooms alone would allow.
FORBIDDEN = [
    # Metrics take predictions and references; they never see a model or an image.
    ("vlm.eval.metrics", "torch"),
    ("vlm.eval.metrics", "transformers"),
    ("vlm.eval.metrics", "PIL"),
    ("vlm.eval.metrics", "vlm.model"),
    ("vlm.eval.metrics", "vlm.generation"),
    # A run that is refused, a help text and a bad path should not wait for torch.
    ("vlm.errors", "torch"),
    ("vlm.settings", "torch"),
    ("vlm.registry", "torch"),
    ("vlm.words", "torch"),
    ("vlm.threads", "torch"),
    ("vlm.train.config", "torch"),
    ("vlm.images.load", "torch"),
    ("vlm.data", "torch"),
    ("vlm.report", "torch"),
]


def below(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layer(module: str) -> int:
    return house.ROOMS[house.room(module)].layer


# --- the table of rooms -----------------------------------------------------------------------------------------------


def test_the_reader_sees_every_kind_of_import(tmp_path: Path) -> None:
    """Guards the other tests against a reader that finds nothing: one file with an import of each kind."""
    package = tmp_path / "vlm"
    (package / "kinds").mkdir(parents=True)
    for name in ("__init__", "a", "b", "c", "d", "kinds/__init__", "kinds/one", "kinds/contract"):
        (package / f"{name}.py").write_text("")
    (package / "kinds" / "__init__.py").write_text('_HOMES = {"One": "one", "a": "vlm.a"}\n')
    (package / "user.py").write_text(
        "from typing import TYPE_CHECKING\nfrom vlm import a\nif TYPE_CHECKING:\n    from vlm.b import B\n"
        'def f(find):\n    import vlm.c\n    find("vlm.kinds", "one")\n    find("vlm.d:main")\n'
    )
    small = house.House(tmp_path)
    found = {(one.imported, one.kind) for one in small.own() if one.importer == "vlm.user"}
    assert found == {
        ("vlm.a", house.TOP),
        ("vlm.b", house.TYPE),
        ("vlm.c", house.LATE),
        ("vlm.kinds.one", house.COMPUTED),
        ("vlm.d", house.COMPUTED),
    }
    assert small.graph()["vlm.kinds"] == {"vlm.kinds.one", "vlm.a"}


def test_a_chain_and_a_circle_are_found() -> None:
    graph = {"a": ["b", "c"], "b": ["c"], "c": ["d"], "d": [], "e": ["f"], "f": []}
    assert house.longest_chain(graph) == ["a", "b", "c", "d"] and house.circles(graph) == []
    assert house.circles({**graph, "d": ["b"]}) == [["b", "c", "d"]]
    with pytest.raises(ValueError, match="b <-> c <-> d"):
        house.longest_chain({**graph, "d": ["b"]})


def test_every_room_is_in_the_table_and_there() -> None:
    assert {house.room(name) for name in HOUSE.files} == set(house.ROOMS)


def test_rooms_import_what_the_table_says() -> None:
    may = house.allowed()
    wrong = [str(found) for found in OWN if house.room(found.imported) not in may[house.room(found.importer)]]
    # The package itself only shows names, each imported when it is used.
    assert [line for line in wrong if not line.startswith("vlm:")] == []


def test_the_table_itself_goes_down() -> None:
    for name, one in house.ROOMS.items():
        assert [other for other in one.imports if house.ROOMS[other].layer > one.layer] == [], name
    assert house.circles({name: one.imports for name, one in house.ROOMS.items()}) == []


def test_no_import_goes_in_a_circle() -> None:
    assert house.circles(HOUSE.graph()) == [] and house.circles(HOUSE.room_graph()) == []


def test_chains_are_short() -> None:
    by_file, by_room = house.longest_chain(HOUSE.graph()), house.longest_chain(HOUSE.room_graph())
    assert len(by_file) <= MAX_CHAIN_BY_FILE, " > ".join(by_file)
    assert len(by_room) <= MAX_CHAIN_BY_ROOM, " > ".join(by_room)


def test_no_room_outgrows_the_others_and_few_files_lie_outside() -> None:
    found = house.facts(HOUSE)
    assert len(found["top"]) <= MAX_TOP, found["top"]
    assert {name: one for name, one in found["rooms"].items() if one["share"] > MAX_SHARE} == {}


def test_nobody_goes_through_a_door() -> None:
    """Doors are for users: inside, an import names the file that it needs; so chains are short, and circles seen."""
    lazy = {name for name in HOUSE.doors if "_HOMES" in HOUSE.files[name].read_text(encoding="utf-8")}
    assert len(lazy) > 10
    wrong = [str(f) for f in OWN if f.imported in lazy and f.kind != house.COMPUTED and f.importer not in lazy]
    assert wrong == []


def names_taken() -> Iterator[tuple[str, str, str]]:
    """(importing room, module of another room, name) of every `from module import name` between rooms."""
    for importer in HOUSE.files:
        for node in ast.walk(HOUSE.trees[importer]):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module in HOUSE.files:
                there = house.room(node.module)
                if house.GROUND not in (there, house.room(importer)) and there != house.room(importer):
                    yield from ((house.room(importer), node.module, alias.name) for alias in node.names)


def test_what_a_room_keeps_to_itself_stays_there() -> None:
    """No name or file that begins with an underscore is taken from another room."""
    wrong = [taken for taken in names_taken() if taken[2].startswith("_") or "._" in taken[1]]
    assert wrong == []


@pytest.mark.parametrize("package", ["vlm.encoders", "vlm.projectors", "vlm.decoders"])
def test_siblings_do_not_know_each_other(package: str) -> None:
    """But for the fused tower, which is made of others and looks them up by their kind."""
    kinds = set(HOUSE.kinds(package))
    assert kinds
    pairs = {(f.importer, f.kind) for f in OWN if f.importer in kinds and f.imported in kinds}
    assert pairs <= {("vlm.encoders.fused", house.COMPUTED)}


# --- libraries --------------------------------------------------------------------------------------------------------


def test_each_layer_keeps_to_its_libraries() -> None:
    wrong = []
    for found in OUTSIDE:
        allowed = set().union(*THIRD_PARTY[: layer(found.importer) + 1]) | OPTIONAL
        if found.imported.split(".")[0] not in allowed:
            wrong.append(str(found))
    assert wrong == []


def test_lightning_is_imported_by_training_alone() -> None:
    """Its releases 2.6.2 and 2.6.3 were malicious: whoever captions, evaluates or serves never runs it."""
    lightning = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torchmetrics"}
    users = {found.importer for found in OUTSIDE if found.imported.split(".")[0] in lightning}
    assert users and all(below(name, "vlm.train") for name in users)


def test_late_libraries_are_imported_in_functions() -> None:
    assert [str(f) for f in OUTSIDE if f.imported.split(".")[0] in LATE and f.kind == house.TOP] == []


@pytest.mark.parametrize(("importer", "imported"), FORBIDDEN)
def test_forbidden_pairs(importer: str, imported: str) -> None:
    assert any(below(name, importer) for name in HOUSE.files)
    found = [str(f) for f in HOUSE.imports if below(f.importer, importer) and below(f.imported, imported)]
    assert found == []


def test_every_extra_has_code_and_every_optional_import_an_extra() -> None:
    module_of = {"open_clip_torch": "open_clip", "lmms-eval": "lmms_eval", "faiss-cpu": "faiss"}
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    named = {name: re.split(r"[<>=\[;]", wanted[0])[0] for name, wanted in extras.items() if name != "dev"}
    modules = {module_of.get(package, package) for package in named.values()}
    imported = {found.imported.split(".")[0] for found in OUTSIDE}
    imported |= {"tensorboard"} if "torch.utils.tensorboard" in {found.imported for found in OUTSIDE} else set()
    assert modules == OPTIONAL and modules - imported == set()


def test_set_up_pins_lightning_by_hash_in_the_range_of_pyproject() -> None:
    lines = (ROOT / "requirements" / "lightning.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            found = re.fullmatch(r"([a-z-]+)==([0-9.]+)((?: --hash=sha256:[0-9a-f]{64})+)", line)
            assert found, line
            pins[found[1]] = tuple(map(int, found[2].split(".")))
    assert set(pins) == {"lightning", "pytorch-lightning", "lightning-utilities", "torchmetrics"}
    assert (2, 6, 4) <= pins["lightning"] < (3,) and pins["pytorch-lightning"] == pins["lightning"]
    assert '"lightning>=2.6.4,<3"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_module_is_imported_without_what_windows_lacks() -> None:
    """Once as here, so that all libraries are there; then again without the modules and names of POSIX."""
    code = f"""
import importlib, os, signal, sys
names = {sorted(set(HOUSE.files) - {"vlm.__main__"})!r}
for name in names:
    importlib.import_module(name)
for name in [name for name in sys.modules if name.split(".")[0] == "vlm"]:
    del sys.modules[name]
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog"):
    sys.modules[name] = None
posix = {{
    os: ("fork", "geteuid", "getuid", "sched_getaffinity", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "WNOHANG", "nice"),
    signal: ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "setitimer", "alarm"),
}}
for module, lacking in posix.items():
    for name in lacking:
        vars(module).pop(name, None)
wrong = []
for name in names:
    try:
        importlib.import_module(name)
    except Exception as error:
        wrong.append(f"{{name}}: {{error!r}}")
print(wrong)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a module with the called name as written, such as `torch.load`."""
    for node in ast.walk(HOUSE.trees[name]):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_only_known_modules_import_by_computed_names() -> None:
    found = {name for name in HOUSE.files for called, _ in calls(name) if called.split(".")[-1] == "import_module"}
    assert found <= DYNAMIC_IMPORTS
    assert not [name for name in HOUSE.files for called, _ in calls(name) if called in ("__import__", "exec", "eval")]


def test_nothing_can_run_code_from_a_checkpoint() -> None:
    """No pickle, no remote code: checkpoints are safetensors and JSON."""
    pickles = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}
    assert [str(found) for found in HOUSE.imports if found.imported.split(".")[0] in pickles] == []
    for name in HOUSE.files:
        for called, call in calls(name):
            if called == "torch.load":  # asked for by name, in a process of its own
                assert name == "vlm.exchange.unpickle", f"{name}:{call.lineno}: {called}"
                assert "weights_only=True" in map(ast.unparse, call.keywords), f"{name}:{call.lineno}: {called}"
            if called in ("np.load", "numpy.load"):
                assert "allow_pickle=False" in map(ast.unparse, call.keywords), f"{name}:{call.lineno}: {called}"
            trusting = [ast.unparse(word) for word in call.keywords if word.arg == "trust_remote_code"]
            assert trusting in ([], ["trust_remote_code=False"]), f"{name}:{call.lineno}"
            # Left open, transformers asks on the terminal.
            if called.startswith("Auto") and called.endswith(".from_pretrained"):
                assert trusting, f"{name}:{call.lineno}: {called}"


def test_light_modules_do_not_load_torch() -> None:
    light = ["cli.options", "train", "train.config", "eval", "eval.metrics", "eval.tasks", "demo", "data", "images"]
    light += ["compare.config", "children", "ranks"]
    heavy = ("torch", "transformers", "lightning")
    code = f"import sys, {', '.join('vlm.' + name for name in light)}; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_public_names_resolve_and_an_unknown_one_is_an_attribute_error() -> None:
    import vlm

    for name in vlm.__all__:
        assert getattr(vlm, name) is not None
    assert set(vlm.__all__) <= set(dir(vlm))
    with pytest.raises(AttributeError, match="'vlm' has no attribute 'laod'"):
        vlm.laod  # noqa: B018


LINKS = ("encoders", "projectors", "train", "eval")


def test_the_links_at_the_root_lead_into_the_package() -> None:
    """Where git makes no links (Windows without the right to), the checkout has a file that holds the path."""
    for name in LINKS:
        link = ROOT / name
        if link.is_file():
            assert link.read_text(encoding="utf-8").strip() == f"vlm/{name}"
        else:
            assert link.is_symlink() and link.readlink() == Path("vlm") / name and link.is_dir()


@pytest.mark.parametrize("name", LINKS)
def test_nothing_is_imported_through_a_link(name: str) -> None:
    """It would be a second copy of the module, whose classes and registrations are not those of the first."""
    code = f"import {name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and f"import vlm.{name}, not {name}" in last or not (ROOT / name).is_symlink(), last
    with (ROOT / "pyproject.toml").open("rb") as file:
        tools = tomllib.load(file)["tool"]
    assert f"./{name}" in tools["ruff"]["extend-exclude"] and name in tools["pyright"]["exclude"]
    assert re.match(tools["mypy"]["exclude"][0], f"{name}/x.py") and not re.match(
        tools["mypy"]["exclude"][0], f"vlm/{name}/x.py"
    )
    assert tools["setuptools"]["packages"]["find"]["include"] == ["vlm*"]


def test_no_tracked_file_is_large() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    sizes = {name: (ROOT / name).stat().st_size for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    assert {name: size for name, size in sizes.items() if size > 6_000_000} == {}
