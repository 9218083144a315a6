"""Build, train, evaluate and run PaliGemma-style vision-language models.

    import vlm

    model, processor = vlm.load("path/to/model")
    print(vlm.generate(model, processor, ["cat.jpg"], ["caption en"])[0])

Nothing heavy is imported here: torch and transformers load when the first name that needs them is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlm import threads

# Before anything here can load torch, whose libraries read the environment once.
threads.prepare()

__version__ = "0.1.0"

# public name -> the module that defines it
_HOMES = {
    "VLM": "model",
    "VLMConfig": "config",
    "Processor": "processor",
    "Batch": "processor",
    "new": "build",
    "load": "checkpoints",
    "save": "checkpoints",
    "export": "checkpoints.export",
    "convert": "checkpoints.importing",
    "generate": "generation",
    "load_image": "images",
    "VLMError": "errors",
}
_MODULES = (
    "check",
    "checkpoints",
    "data",
    "demo",
    "encoders",
    "errors",
    "eval",
    "generation",
    "images",
    "info",
    "locations",
    "loss",
    "masks",
    "presets",
    "projectors",
    "prompts",
    "settings",
    "siglip",
    "train",
)

__all__ = ["__version__", *_HOMES, *_MODULES]

if TYPE_CHECKING:
    from vlm.build import new as new
    from vlm.checkpoints import load as load
    from vlm.checkpoints import save as save
    from vlm.checkpoints.export import export as export
    from vlm.checkpoints.importing import convert as convert
    from vlm.config import VLMConfig as VLMConfig
    from vlm.errors import VLMError as VLMError
    from vlm.generation import generate as generate
    from vlm.images import load_image as load_image
    from vlm.model import VLM as VLM
    from vlm.processor import Batch as Batch
    from vlm.processor import Processor as Processor


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"vlm.{_HOMES[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"vlm.{name}")
    else:
        raise AttributeError(f"module 'vlm' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
