"""Compare vision towers (and projectors): one run per tower, projector and seed, everything else the same.

    config = vlm.compare.load_config("compare.yaml")
    result = vlm.compare.compare(config, "runs/towers")

Names resolve when they are used, so importing this package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# public name -> the module that defines it; a module called like a function would hide it once imported
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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlm.compare' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"vlm.compare.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
