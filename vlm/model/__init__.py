"""The model: configuration, processor and batch, masks, forward and loss."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "VLM": "forward",
    "VLMModel": "forward",
    "VLMConfig": "config",
    "Processor": "processor",
    "Batch": "batch",
    "loss": "",
    "masks": "",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.model import loss as loss
    from vlm.model import masks as masks
    from vlm.model.batch import Batch as Batch
    from vlm.model.config import VLMConfig as VLMConfig
    from vlm.model.forward import VLM as VLM
    from vlm.model.forward import VLMModel as VLMModel
    from vlm.model.processor import Processor as Processor

__getattr__, __dir__ = door(__name__, _HOMES)

# After `import vlm.model` transformers' Auto classes open our models.
import vlm.model.registration  # noqa: E402, F401
