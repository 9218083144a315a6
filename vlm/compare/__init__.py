"""Compare vision towers (and projectors): one run per tower, projector and seed, everything else the same.

    config = vlm.compare.load_config("compare.yaml")
    result = vlm.compare.compare(config, "runs/towers")

Names resolve when they are used, so importing this package does not import torch.
"""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "compare": "comparison",
    "plan": "comparison",
    "load_config": "config",
    "CompareConfig": "config",
    "TaskConfig": "config",
    "ProbeConfig": "config",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.compare.comparison import compare as compare
    from vlm.compare.comparison import plan as plan
    from vlm.compare.config import CompareConfig as CompareConfig
    from vlm.compare.config import ProbeConfig as ProbeConfig
    from vlm.compare.config import TaskConfig as TaskConfig
    from vlm.compare.config import load_config as load_config

__getattr__, __dir__ = door(__name__, _HOMES)
