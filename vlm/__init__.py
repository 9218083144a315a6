"""Build, train, evaluate and run PaliGemma-style vision-language models.

    import vlm

    model, processor = vlm.load("path/to/model")
    print(vlm.generate(model, processor, ["cat.jpg"], ["caption en"])[0])

Nothing heavy is imported here: torch and transformers load when the first name that needs them is used.
"""

from typing import TYPE_CHECKING

from vlm import threads
from vlm.registry import door
from vlm.version import __version__ as __version__

# Before anything here can load torch, whose libraries read the environment once.
threads.prepare()

_HOMES = {
    "VLM": "model.forward",
    "VLMConfig": "model.config",
    "Processor": "model.processor",
    "Batch": "model.batch",
    "new": "build.assembly",
    "load": "checkpoints.directory",
    "save": "checkpoints.saving",
    "export": "exchange.exporting",
    "convert": "exchange.importing",
    "generate": "generation.models",
    "load_image": "images.load",
    "VLMError": "errors",
    **dict.fromkeys(
        (
            *("errors", "settings", "images", "text", "data", "report", "encoders", "projectors", "model"),
            *("checkpoints", "build", "exchange", "generation", "measure", "siglip"),
            *("train", "eval", "check", "compare", "demo"),
        ),
        "",
    ),
}
"""Public name -> the module that defines it; "" where it is a module itself."""

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from vlm.build.assembly import new as new
    from vlm.checkpoints.directory import load as load
    from vlm.checkpoints.saving import save as save
    from vlm.errors import VLMError as VLMError
    from vlm.exchange.exporting import export as export
    from vlm.exchange.importing import convert as convert
    from vlm.generation.models import generate as generate
    from vlm.images.load import load_image as load_image
    from vlm.model.batch import Batch as Batch
    from vlm.model.config import VLMConfig as VLMConfig
    from vlm.model.forward import VLM as VLM
    from vlm.model.processor import Processor as Processor

__getattr__, __dir__ = door(__name__, _HOMES)
