"""Model directories: open and write them, whole or part by part. Weights are safetensors only."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "load": "directory",
    "save": "saving",
}
__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.checkpoints.directory import load as load
    from vlm.checkpoints.saving import save as save

__getattr__, __dir__ = door(__name__, _HOMES)
