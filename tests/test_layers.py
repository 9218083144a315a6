"""Who may import whom: the layer table of docs/design.md, as data, held against every import in the package."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from vlm import registry

ROOT = Path(__file__).resolve().parent.parent

# A module imports from lower layers and from its own, and never in a circle.
LAYERS = (
    ("errors", "settings", "files", "children", "threads", "ranks", "registry", "version", "words"),
    ("images", "text", "data", "report"),
    ("encoders", "projectors", "decoders"),
    ("model",),
    ("checkpoints", "build", "exchange", "generation", "measure", "siglip"),
    ("eval", "train", "check"),
    ("demo", "compare", "cli", "__main__"),
)
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
OPTIONAL = {"tensorboard", "timm", "open_clip", "pycocoevalcap", "datasets", "lmms_eval"}
# Take seconds or show up in every start: imported in functions wherever a light module leads to them.
LATE = OPTIONAL | {"rich"}
# (importer, imported) that the layers alone would allow.
FORBIDDEN = [
    ("vlm.eval", "vlm.train"),
    ("vlm.train", "vlm.demo"),
    ("vlm.encoders", "vlm.projectors"),
    ("vlm.projectors", "vlm.encoders"),
    # Metrics take predictions and references; they never see a model or an image.
    ("vlm.eval.metrics", "torch"),
    ("vlm.eval.metrics", "transformers"),
    ("vlm.eval.metrics", "PIL"),
    ("vlm.eval.metrics", "vlm.model"),
    ("vlm.eval.metrics", "vlm.model.processor"),
    ("vlm.errors", "torch"),
    ("vlm.settings", "torch"),
    ("vlm.threads", "torch"),
    ("vlm.data", "torch"),
    ("vlm.images.load", "torch"),
]
# Only these may import a module whose name they compute; each looks it up in a list of our own names first.
DYNAMIC_IMPORTS = {"vlm.registry", "vlm.eval.metrics", "vlm.data.benchmarks"}


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    line: int
    """Of the importing file."""
    late: bool
    """Inside a function."""

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted((ROOT / "vlm").rglob("*.py"))}


def imports_of(name: str) -> Iterator[Import]:
    """Every import of a module, but those for the type checker only."""
    path = SOURCES[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    pending: list[tuple[ast.AST, bool]] = [(tree, False)]
    while pending:
        node, late = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += [(child, late) for child in node.orelse]
            continue
        inside = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        pending += [(child, inside) for child in ast.iter_child_nodes(node)]
        if isinstance(node, ast.Import):
            yield from (Import(name, alias.name, node.lineno, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            for alias in node.names:  # `from package import module` imports the module
                full = f"{base}.{alias.name}"
                yield Import(name, full if full in SOURCES else base, node.lineno, late)


IMPORTS = [found for name in SOURCES for found in imports_of(name)]
OWN = [found for found in IMPORTS if found.imported.split(".")[0] == "vlm"]
OUTSIDE = [
    found for found in IMPORTS if found.imported.split(".")[0] not in {"vlm", "__future__", *sys.stdlib_module_names}
]


def layer(module: str) -> int:
    """The layer of `vlm.x` or anything below it; the package itself counts as the lowest, because it imports lazily."""
    if module == "vlm":
        return 0
    name = module.split(".")[1]
    found = [number for number, names in enumerate(LAYERS) if name in names]
    assert len(found) == 1, f"{module}: the layer table should name it once"
    return found[0]


def below(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_the_reader_sees_the_imports() -> None:
    """Guards the other tests against a reader that finds nothing."""
    assert len(SOURCES) > 40 and len(OWN) > 150 and len(OUTSIDE) > 60
    assert any(f.importer == "vlm.cli.commands.train" and f.imported == "vlm.train.run" and f.late for f in OWN)
    assert any(f.importer == "vlm.model.masks" and f.imported == "torch" and not f.late for f in OUTSIDE)


def test_every_module_has_a_layer_and_every_entry_a_module() -> None:
    top = {name.split(".")[1] for name in SOURCES if name != "vlm"}
    assert top == {name for names in LAYERS for name in names}


def test_imports_go_down() -> None:
    assert [str(found) for found in OWN if layer(found.imported) > layer(found.importer)] == []


def test_no_import_goes_in_a_circle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in SOURCES}
    for found in OWN:
        if found.imported != found.importer:
            graph[found.importer].add(found.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("imports in a circle: " + " <- ".join(error.args[1]))


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


def test_every_extra_has_code_and_every_optional_import_an_extra() -> None:
    module_of = {"open_clip_torch": "open_clip", "lmms-eval": "lmms_eval"}
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
names = {sorted(set(SOURCES) - {"vlm.__main__"})!r}
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


def test_late_libraries_are_imported_in_functions() -> None:
    assert [str(found) for found in OUTSIDE if found.imported.split(".")[0] in LATE and not found.late] == []


@pytest.mark.parametrize(("importer", "imported"), FORBIDDEN)
def test_forbidden_pairs(importer: str, imported: str) -> None:
    assert any(below(name, importer) for name in SOURCES)
    found = [str(found) for found in IMPORTS if below(found.importer, importer) and below(found.imported, imported)]
    assert found == []


@pytest.mark.parametrize("package", ["vlm.encoders", "vlm.projectors", "vlm.decoders"])
def test_siblings_do_not_know_each_other(package: str) -> None:
    files = {name for name in SOURCES if name.startswith(package + ".")}
    kinds = {f"{package}.{kind}" for kind in registry.kinds(package)}
    assert kinds and kinds <= files
    wrong = [str(f) for f in OWN if f.importer in files and f.imported in kinds]
    assert wrong == []


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a module with the called name as written, such as `torch.load`."""
    for node in ast.walk(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_only_known_modules_import_by_computed_names() -> None:
    found = {name for name in SOURCES for called, _ in calls(name) if called.split(".")[-1] == "import_module"}
    assert found <= DYNAMIC_IMPORTS
    assert not [name for name in SOURCES for called, _ in calls(name) if called in ("__import__", "exec", "eval")]


def test_nothing_can_run_code_from_a_checkpoint() -> None:
    """No pickle, no remote code: checkpoints are safetensors and JSON."""
    pickles = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}
    assert [str(found) for found in IMPORTS if found.imported.split(".")[0] in pickles] == []
    for name in SOURCES:
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


def test_the_links_at_the_root_lead_into_the_package() -> None:
    for name in ("encoders", "projectors", "train", "eval"):
        link = ROOT / name
        assert link.is_symlink() and link.readlink() == Path("vlm") / name and link.is_dir()


def test_no_tracked_file_is_large() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    sizes = {name: (ROOT / name).stat().st_size for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    assert {name: size for name, size in sizes.items() if size > 6_000_000} == {}
