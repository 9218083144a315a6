"""`vlm import --from-pickle`: a checkpoint that was published as a pickle, as the same directory with safetensors.

A pickle can run code when it is opened, so nothing in this library opens one; this conversion, which has to be asked
for by name, has it read by torch's weights-only reader in a process of its own (`vlm.exchange.unpickle`), and
refuses what that refuses.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.checkpoints import manifest
from vlm.checkpoints.files import INDEX, SINGLE, check_regular, is_plain, read_json
from vlm.checkpoints.places import HUB_FILES, locate
from vlm.checkpoints.weights import read_header
from vlm.errors import CheckpointError
from vlm.exchange.hub_files import write_json
from vlm.exchange.publishing import check_out, published
from vlm.files import sha256

PICKLES = {"pytorch_model.bin": SINGLE, "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}
"""What a checkpoint's pickle is called, and the file with safetensors in its place."""
PICKLE_INDEX = "pytorch_model.bin.index.json"
KEPT = ("*.json", "*.txt", "*.model", "README.md", "LICENSE*")
"""Files of a directory that are copied beside the weights; code is not."""
RECORD = "converted.json"
SECONDS, SECONDS_PER_GB = 120, 120
"""The time that a file may take."""


@dataclass(frozen=True)
class Converted:
    """One file.

    Attributes:
        source, target: names of the files.
        facts: number of tensors, bytes, dtypes, and what was left out.
        digest: sha256 of the pickle.
    """

    source: str
    target: str
    facts: dict[str, Any]
    digest: str

    def __str__(self) -> str:
        facts = self.facts
        inside = (
            f", found under {facts['inside']!r} ({', '.join(facts['left_out'])} left out)" if facts["inside"] else ""
        )
        return (
            f"{self.source}: {facts['tensors']} tensors, {facts['bytes']:,} bytes, {', '.join(facts['dtypes'])}{inside}"
            f" -> {self.target}"
        )


def convert_pickle(source: str | Path, out: str | Path, *, revision: str | None = None) -> list[Converted]:
    """Write a checkpoint with safetensors in the place of its pickled weights; settings and tokenizer are copied.

    Args:
        source: a directory or hub id with `pytorch_model.bin` (or its shards), or `open_clip_pytorch_model.bin`; or a
            pickled file alone.
        out: the directory to make; it must not exist, or be empty.

    Returns:
        what was converted; also saved as `converted.json`.

    Raises:
        CheckpointError: no pickled weights, weights that are safetensors already, a file that holds anything but
            tensors by name, or that takes too much memory or time; nothing is left behind.
    """
    check_out(Path(out))
    names, folder = _pickles(source, revision)
    alone = Path(source).is_file()
    done: list[Converted] = []
    with published(Path(out)) as made:
        for name, target in names.items():
            done.append(_convert(folder / name, made / target))
        if len(done) > 1:
            _write_index(made, done)
        if not alone:
            _copy_others(folder, made)
        record = [{"source": one.source, "target": one.target, "sha256": one.digest, **one.facts} for one in done]
        write_json(made / RECORD, {"files": [{k: v for k, v in one.items() if k != "names"} for one in record]})
        manifest.write(made)
    return done


def _pickles(source: str | Path, revision: str | None) -> tuple[dict[str, str], Path]:
    """Pickled file -> file to make, and the directory that they are in."""
    path = Path(source)
    if path.is_file():
        check_regular(path)
        return {path.name: PICKLES.get(path.name, SINGLE)}, path.parent
    folder = locate(source, revision=revision, patterns=(*HUB_FILES, "*.bin"))
    ready = [name for name in (SINGLE, INDEX, PICKLES["open_clip_pytorch_model.bin"]) if (folder / name).exists()]
    if ready:
        raise CheckpointError(f"{source}: has {ready[0]} already, so there is nothing to convert; use it as it is")
    if (folder / PICKLE_INDEX).exists():
        listed = read_json(folder / PICKLE_INDEX).get("weight_map")
        shards = sorted(set(listed.values())) if isinstance(listed, dict) else []
        if not shards or not all(isinstance(name, str) and is_plain(name) for name in shards):
            raise CheckpointError(f"{folder / PICKLE_INDEX}: weight_map is no map from tensors to files beside it")
        count = len(shards)
        if count == 1:
            return {shards[0]: SINGLE}, folder
        return {name: f"model-{i:05d}-of-{count:05d}.safetensors" for i, name in enumerate(shards, 1)}, folder
    found = {name: target for name, target in PICKLES.items() if (folder / name).exists()}
    if not found:
        raise CheckpointError(
            f"{source}: no pickled weights ({', '.join(PICKLES)} or {PICKLE_INDEX}); give the file itself if it has"
            f" another name"
        )
    return found, folder


def _convert(source: Path, target: Path) -> Converted:
    """One file, in a child process."""
    check_regular(source)
    unpickle = str(Path(__file__).with_name("unpickle.py"))
    seconds = SECONDS + SECONDS_PER_GB * source.stat().st_size / 1e9
    # The file alone, without the package around it, which takes seconds to import; -P: nor its folder as a place of
    # modules.
    command = [sys.executable, "-P", unpickle, str(source.resolve()), str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{source}: not converted within {seconds:.0f} seconds, and given up") from error
    lines = done.stdout.splitlines()
    try:
        facts: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    except ValueError:
        facts = {}
    if done.returncode != 0 or "names" not in facts:
        why = facts.get("error") or f"its reader ended with status {done.returncode}"
        raise CheckpointError(
            f"{source}: refused by torch's weights-only reader: {why}. A checkpoint of weights holds tensors by name"
            f" and nothing else; take another file or repository, one with safetensors"
        )
    if set(read_header(target)) != set(facts["names"]):
        raise CheckpointError(f"{target}: does not hold the tensors of {source}; report it")
    return Converted(source.name, target.name, facts, sha256(source))


def _write_index(folder: Path, done: list[Converted]) -> None:
    where = {name: one.target for one in done for name in one.facts["names"]}
    total = sum(one.facts["bytes"] for one in done)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _copy_others(folder: Path, made: Path) -> None:
    for pattern in KEPT:
        for file in sorted(folder.glob(pattern)):
            if file.is_file() and file.name not in (PICKLE_INDEX, manifest.NAME):
                shutil.copyfile(file, made / file.name)
