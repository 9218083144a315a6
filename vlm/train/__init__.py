"""Training in stages: `vlm.train.run(config)` and the configuration it takes.

    config = vlm.train.load_config("run.yaml", ["stages.0.steps=100"])
    model_dir = vlm.train.run(config, resume=False)

Names resolve when they are used, so importing this package does not import torch.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vlm.registry import door

_HOMES = {
    "run": "run",
    "load_config": "config",
    "RunConfig": "config",
    "ModelConfig": "config",
    "DataConfig": "config",
    "Source": "config",
    "StageConfig": "stage_config",
    "FrozenEncoderModule": "step",
    "FullModule": "step",
    # What other rooms of the package use, each from the module that defines it.
    "Stopped": "signals",
    "StopSignal": "signals",
    "data_digest": "sources",
    "differences": "changes",
    "essential": "changes",
    "failures": "",
    "frozen_digests": "freezing",
    "step_log": "",
    "quiet_transformers": "quiet",
    "read_sources": "sources",
    "tower_settings": "models",
    "towers": "models",
    "trained": "history",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.train.config import DataConfig as DataConfig
    from vlm.train.config import ModelConfig as ModelConfig
    from vlm.train.config import RunConfig as RunConfig
    from vlm.train.config import Source as Source
    from vlm.train.config import load_config as load_config
    from vlm.train.run import run as run
    from vlm.train.stage_config import StageConfig as StageConfig
    from vlm.train.step import FrozenEncoderModule as FrozenEncoderModule
    from vlm.train.step import FullModule as FullModule

__getattr__, __dir__ = door(__name__, _HOMES)


class _Room(ModuleType):
    """`vlm.train.run` is the function, also once its file has been imported: Python then puts the file's module there,
    and `vlm.train.run(config)` would depend on who had imported what before."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.run if name == "run" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Room
