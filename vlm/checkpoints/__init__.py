"""Model directories: open and write them, whole or part by part. Weights are safetensors only."""

from vlm.checkpoints.directory import load
from vlm.checkpoints.saving import save

__all__ = ["load", "save"]
