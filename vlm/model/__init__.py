"""The model: configuration, processor and batch, masks, forward and loss; models of two towers; and, from a
configuration, what the files of its parts say of them (`parts`, `projecting`, `decoder`)."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "VLM": "forward",
    "VLMModel": "forward",
    "VLMConfig": "config",
    "Processor": "processor",
    "ImageSource": "processor",
    "Batch": "batch",
    "DualTower": "dual",
    "TwoTowerOutput": "dual",
    "CACHE": "outputs",
    "attention_backends": "",
    "decoder": "",
    "image_groups": "samples",
    "knn": "classifiers",
    "linear": "classifiers",
    "lengths": "",
    "loss": "",
    "masks": "",
    "parts": "",
    "projecting": "",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.model import attention_backends as attention_backends
    from vlm.model import decoder as decoder
    from vlm.model import lengths as lengths
    from vlm.model import loss as loss
    from vlm.model import masks as masks
    from vlm.model import parts as parts
    from vlm.model import projecting as projecting
    from vlm.model.batch import Batch as Batch
    from vlm.model.classifiers import knn as knn
    from vlm.model.classifiers import linear as linear
    from vlm.model.config import VLMConfig as VLMConfig
    from vlm.model.dual import DualTower as DualTower
    from vlm.model.dual import TwoTowerOutput as TwoTowerOutput
    from vlm.model.forward import VLM as VLM
    from vlm.model.forward import VLMModel as VLMModel
    from vlm.model.outputs import CACHE as CACHE
    from vlm.model.processor import ImageSource as ImageSource
    from vlm.model.processor import Processor as Processor
    from vlm.model.samples import image_groups as image_groups

__getattr__, __dir__ = door(__name__, _HOMES)

# After `import vlm.model` transformers' Auto classes open our models.
import vlm.model.registration  # noqa: E402, F401
