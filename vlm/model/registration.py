"""transformers' Auto classes open our models: `import vlm.model` is enough."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from vlm.model.config import VLMConfig
from vlm.model.forward import VLM, VLMModel
from vlm.model.processor import Processor

AutoConfig.register(VLMConfig.model_type, VLMConfig, exist_ok=True)
AutoModel.register(VLMConfig, VLMModel, exist_ok=True)
AutoModelForImageTextToText.register(VLMConfig, VLM, exist_ok=True)
AutoProcessor.register(VLMConfig, Processor, exist_ok=True)
