"""Training in stages: `vlm.train.run(config)` and the configuration it takes.

    config = vlm.train.load_config("run.yaml", ["stages.0.steps=100"])
    model_dir = vlm.train.run(config, resume=False)

Names resolve when they are used, so importing this package does not import torch.
"""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "run": "runner",
    "load_config": "config",
    "RunConfig": "config",
    "ModelConfig": "config",
    "DataConfig": "config",
    "Source": "config",
    "StageConfig": "config",
    "FrozenEncoderModule": "modules",
    "FullModule": "modules",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.train.config import DataConfig as DataConfig
    from vlm.train.config import ModelConfig as ModelConfig
    from vlm.train.config import RunConfig as RunConfig
    from vlm.train.config import Source as Source
    from vlm.train.config import StageConfig as StageConfig
    from vlm.train.config import load_config as load_config
    from vlm.train.modules import FrozenEncoderModule as FrozenEncoderModule
    from vlm.train.modules import FullModule as FullModule
    from vlm.train.runner import run as run

__getattr__, __dir__ = door(__name__, _HOMES)
