"""A model as the directory that the Hub's PaliGemma checkpoints are: configuration, weights, tokenizer, processor.

transformers' `PaliGemmaForConditionalGeneration`, vLLM and lmms-eval read it. Every number is written, because
transformers' own defaults are wrong for PaliGemma (tower width 4096 for 4304, image token 256000, which is `<loc0000>`)
and a freshly built transformers model writes tower names that other readers do not know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from vlm.checkpoints.configs import WINDOW_IN_USE
from vlm.checkpoints.names import HEAD, to_hub
from vlm.checkpoints.shards import write_shards
from vlm.encoders.contract import stated
from vlm.errors import ConfigError
from vlm.exchange.hub_files import image_values, write_json
from vlm.model import decoder, projecting
from vlm.model.dtypes import dtype_name
from vlm.model.forward import VLM
from vlm.model.parts import encoder_spec
from vlm.model.processor import Processor
from vlm.text.tokens import LOC_TOKENS, SEG_TOKENS

ARCHITECTURE = "PaliGemmaForConditionalGeneration"
KEEP = (
    "keep the vlm directory, which transformers opens after `import vlm.model`, or write the tower alone with"
    " `--to tower`"
)


def check(model: VLM, processor: Processor) -> None:
    """Refuse what PaliGemma's format cannot express.

    Raises:
        ConfigError: what, why, and the nearest thing that works.
    """
    config, transform = model.config, processor.image_transform
    encoder = encoder_spec(config.encoder)
    reason = None
    if encoder.any_aspect:
        reason = "its NaFlex tower reads images of any aspect ratio, PaliGemma's reads one square size"
    elif not encoder.in_paligemma:
        reason = f"its vision tower is {config.encoder!r}, PaliGemma's is SigLIP at a fixed resolution"
    elif encoder.chosen_layers(config.vision_config):
        reason = "its features are other layers of the tower than the last, PaliGemma's are the last with its norm"
    elif not projecting.named(config.projector_config["kind"]).in_paligemma:
        reason = f"its projector is {config.projector_config['kind']!r}, PaliGemma's is one linear layer on each patch"
    elif not decoder.spec(config.text_config).in_paligemma:
        reason = f"its decoder is {config.text_config.model_type!r}, PaliGemma has Gemma 1 and Gemma 2"
    elif not transform.squashes:
        reason = f"its images are prepared by {transform.mode!r}, PaliGemma's image processor resizes to a square"
    if reason is not None:
        raise ConfigError(f"PaliGemma's format cannot hold this model: {reason}; {KEEP}")
    head, table = model.lm_head.weight, model.model.language_model.embed_tokens.weight
    if head is not table and not torch.equal(head, table):
        raise ConfigError(
            f"PaliGemma's format cannot hold this model: its output embedding is not its input embedding, and the"
            f" format has one for both; {KEEP}"
        )
    _check_tokenizer(model, processor)


def _check_tokenizer(model: VLM, processor: Processor) -> None:
    vocabulary = processor.tokenizer.get_vocab()
    if decoder.spec(model.config.text_config).separator not in vocabulary:
        raise ConfigError(
            "the tokenizer has no piece for a newline, which ends every PaliGemma prompt (vLLM looks it up by name);"
            " use a Gemma tokenizer, or vlm.text.tokenizer.build"
        )
    # transformers' PaliGemmaProcessor appends those that are missing.
    missing = [token for token in (*LOC_TOKENS, *SEG_TOKENS) if token not in vocabulary]
    rows, needed = model.config.text_config.vocab_size, max(vocabulary.values()) + 1 + len(missing)
    if needed > rows:
        raise ConfigError(
            f"the tokenizer lacks {len(missing)} of PaliGemma's <loc> and <seg> tokens; transformers would append them"
            f" as ids up to {needed - 1}, the embedding has {rows} rows: build the model with vlm.new, which adds them"
        )


def write(
    folder: Path, model: VLM, processor: Processor, dtype: torch.dtype, max_shard_size: str | int
) -> dict[str, Tensor]:
    """Write all files of the directory but the model card.

    Returns:
        name in the files -> the model's tensor.
    """
    write_json(folder / "config.json", config_values(model, dtype))
    write_json(folder / "generation_config.json", generation_values(processor))
    image = image_values(processor.image_transform)
    write_json(folder / "processor_config.json", {"image_processor": image, "processor_class": "PaliGemmaProcessor"})
    # Readers of before transformers 5, and some servers, look for this one.
    write_json(folder / "preprocessor_config.json", {**image, "processor_class": "PaliGemmaProcessor"})
    write_tokenizer(folder, processor)
    tensors = {to_hub(name): tensor for name, tensor in model.state_dict().items() if name != HEAD}
    write_shards(folder, tensors, dtype, max_shard_size)
    return tensors


def config_values(model: VLM, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json` with every field written."""
    config = model.config
    name = dtype_name(dtype)
    text, vision = architecture(config.text_config), architecture(config.vision_config)
    capped = decoder.spec(config.text_config).final_softcap_setting
    if capped in text and not config.softcap_in_generation:
        text[capped] = None
    # PaliGemmaConfig would set these three; a reader that is not transformers would not.
    text |= {"use_bidirectional_attention": True, "num_image_tokens": num_image_tokens(vision)}
    vision["projection_dim"] = text["hidden_size"]
    windowed = decoder.facts(config.text_config).windowed
    return {
        **({WINDOW_IN_USE: True} if windowed else {}),
        "architectures": [ARCHITECTURE],
        "bos_token_id": text["bos_token_id"],
        "dtype": name,
        "eos_token_id": text["eos_token_id"],
        "hidden_size": text["hidden_size"],
        "image_token_index": config.image_token_id,
        "model_type": "paligemma",
        "pad_token_id": text["pad_token_id"],
        "projection_dim": text["hidden_size"],
        "text_config": {**text, "dtype": name},
        "tie_word_embeddings": True,
        "transformers_version": transformers.__version__,
        "vision_config": {**vision, "dtype": name},
        "vocab_size": text["vocab_size"],
    }


def architecture(config: Any) -> dict[str, Any]:
    """The fields of a part's configuration, defaults included, without those of a running model."""
    return stated(config)


def num_image_tokens(vision: dict[str, Any]) -> int:
    """Tokens of an image: one per whole patch."""
    return int((vision["image_size"] // vision["patch_size"]) ** 2)


def generation_values(processor: Processor) -> dict[str, Any]:
    """`generation_config.json`. No length: vLLM takes one as a limit on every request."""
    tokenizer = processor.tokenizer
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "do_sample": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        # A generated placeholder would ask for an image that is not there.
        "suppress_tokens": [processor.image_token_id],
        "transformers_version": transformers.__version__,
    }


def write_tokenizer(folder: Path, processor: Processor) -> None:
    """The tokenizer's files, with what PaliGemma's readers ask of `tokenizer_config.json`."""
    processor.tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    # BOS is written between image and prefix by the processors, never by the tokenizer. vLLM insists on a bool here,
    # and would put a second BOS in front of the image if it were true.
    values |= {"add_bos_token": False, "add_eos_token": False, "processor_class": "PaliGemmaProcessor"}
    write_json(file, values)
