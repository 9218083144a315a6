"""What a run is made of besides its settings, remembered in `sources.json`: data and checkpoints may change behind the
same path."""

from __future__ import annotations

import json
from pathlib import Path

from vlm.build.towers import sized
from vlm.checkpoints import identity
from vlm.compare.runs import Spec
from vlm.errors import DataError
from vlm.files import write_json
from vlm.train.config import ModelConfig

SOURCES = "sources.json"


def sources(model: ModelConfig, data: str) -> dict[str, str]:
    """What a run is made of that may change behind the same path: name -> digest.

    Args:
        data: digest of the training data. Checkpoints on a hub are left out: their files do not change.
    """
    encoders = model.encoder if isinstance(model.encoder, list) else [model.encoder]
    paths = [sized(one)[0] for one in encoders if isinstance(one, str)]
    paths += [one for one in (model.decoder, model.tokenizer, model.path) if isinstance(one, str | Path)]
    local = [Path(path) for path in paths if Path(path).exists()]
    return {"training data": data, **{str(path): identity.of_checkpoint(path) for path in local}}


def check_sources(spec: Spec, now: dict[str, str]) -> None:
    """Remember what a run is made of, or refuse to go on with, or to count, one that was made of something else.

    Raises `DataError`.
    """
    path = spec.folder / SOURCES
    if not path.exists():
        write_json(path, now)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        raise DataError(
            f"{spec.name}: {' and '.join(changed)} changed after this run was begun; put it back, use another --out, or"
            f" delete {spec.folder} to run it again"
        )
