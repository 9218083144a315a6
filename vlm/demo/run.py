"""The demo from start to end: draw, train in two stages, score on held-out scenes, show.

Every step leaves a file behind and is skipped when that is there, so an interrupted demo goes on where it was.
"""

from __future__ import annotations

import logging
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from vlm import files
from vlm.children import peak_memory_bytes
from vlm.demo import dataset, show, start
from vlm.demo.answers import BATCH_SIZE, MAX_NEW_TOKENS, Answers
from vlm.demo.recipe import Size, claim, read_recipe
from vlm.train.config import load_config

log = logging.getLogger("vlm")

Train = Callable[..., Path]
"""`vlm.train.run`: (configuration, resume=) -> directory of the model."""
LIBRARIES = ("torch", "transformers", "lightning", "pillow", "sentencepiece")


def main(
    out: str | Path = "demo",
    *,
    from_scratch: bool = False,
    pretrain: bool = False,
    encoder: str = "siglip",
    pretrain_encoder: bool = False,
    seed: int = 0,
    size: Size | None = None,
    train: Train,
) -> dict[str, Any]:
    """Run the demo in the directory `out`, or go on with it, and return what `out/demo.json` holds.

    Args:
        out: everything is written below it; made if missing.
        from_scratch: first make the start checkpoints in `out/start`, instead of using those of the package.
        pretrain: make only the start checkpoints (`out/siglip`, `out/gemma`) and, from the package's SigLIP, the one
            with both towers (`out/dual`), and return their sizes in bytes.
        encoder: the tower: a kind, or a checkpoint. `siglip` and `siglip2_naflex` have the package's weights, any other
            kind is a tower of the same size with new weights.
        pretrain_encoder: first pretrain a tower of that kind in `out/start`, as the package's SigLIP was.
        seed: of data, weights and training; the start checkpoints of the package are those of seed 0.
        train: `vlm.train.run`.

    Raises:
        ConfigError: `out` holds a demo with other settings, or there is no such tower.
        Stopped: (a SystemExit) interrupted; running it again goes on.
    """
    out, size = Path(out), size or Size()
    choice = start.Choice(encoder, pretrain_encoder, from_scratch or pretrain, size.pretrain_steps)
    choice.check()
    if pretrain:
        start.make(choice, out, seed)
        if encoder == "siglip":
            start.make_dual(out, seed, size.pretrain_steps)
        return start.list_files(out)
    out.mkdir(parents=True, exist_ok=True)
    tower = {} if choice == start.Choice(steps=choice.steps, from_scratch=from_scratch) else asdict(choice)
    claim(out, {"seed": seed, "from_scratch": from_scratch, "size": repr(size), **tower})
    facts: dict[str, Any] | None = dataset.left_over(out / "demo.json")
    drawn = dataset.whole(out / "data", seed, size.train_scenes, size.test_scenes)
    if facts is not None and drawn and Answers(out, seed, size).complete():
        show.print_results(out, facts, Answers(out, seed, size))
        return facts
    with _Clock(out / "seconds.json") as clock:
        begin = start.make(choice, out / "start", seed)
        log.info("tower: %s", begin.text)
        log.info("drawing scenes")
        dataset.write(out / "data", seed, size.train_scenes, size.test_scenes)
        model = _train(train, out, begin, seed, size)
        answers = Answers(out, seed, size)
        answers.collect(Opened(), model, out / "train" / "start")
        facts = {
            "seconds": round(clock.seconds(), 1),
            "peak_memory_gb": round(peak_memory_bytes() / 1e9, 2),
            **answers.scores(),
            "encoder": begin.facts(),
            "seed": seed,
            "versions": versions(),
        }
        show.write_report(out, facts, answers)
    files.write_json(out / "demo.json", facts)
    show.print_results(out, facts, answers)
    return facts


def _train(train: Train, out: Path, begin: start.Start, seed: int, size: Size) -> Path:
    """Both stages through `vlm train`'s own entry, from a configuration that the user can read and run again."""
    recipe = read_recipe()
    recipe["out"] = str(out / "train")
    recipe["seed"] = seed
    recipe["model"] |= {**begin.model, "seed": seed}
    recipe["data"]["train"] = str(out / "data" / "train.jsonl")
    file = out / "train.yaml"
    files.write_text(file, yaml.safe_dump(recipe, sort_keys=False))
    train(load_config(file, size.overrides), resume=True)
    with files.publishing(out / "model") as folder:
        shutil.copytree(out / "train" / "model", folder, dirs_exist_ok=True)
    return out / "model"


class Opened:
    """The models of the demo, each opened when it is first asked."""

    def __init__(self) -> None:
        self._opened: dict[Path, Any] = {}

    def identity(self, model: Path) -> str:
        from vlm.checkpoints.identity import of_checkpoint

        return of_checkpoint(model)

    def answer(self, model: Path, images: Sequence[Path], prompts: Sequence[str]) -> list[str]:
        from vlm.checkpoints.directory import load
        from vlm.generation.models import generate

        if model not in self._opened:
            self._opened[model] = load(model)
        net, processor = self._opened[model]
        said = generate(net, processor, images, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH_SIZE)
        return [str(text) for text in said]


class _Clock:
    """Seconds spent in a directory over all runs of the demo in it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        before = dataset.left_over(file)
        self.before = float(before) if isinstance(before, int | float) else 0.0

    def __enter__(self) -> _Clock:
        self._start = time.monotonic()
        return self

    def seconds(self) -> float:
        return self.before + time.monotonic() - self._start

    def __exit__(self, *_: object) -> None:
        files.write_json(self.file, self.seconds())


def versions() -> dict[str, str]:
    """Library -> installed version."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
