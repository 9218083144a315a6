"""open_clip checkpoints with both towers (pip install 'vlm-backbone[open-clip]').

Paper: Reproducible Scaling Laws for Contrastive Language-Image Learning (arXiv 2212.07143). Library: open_clip
(https://github.com/mlfoundations/open_clip). The model is the library's own, built from `open_clip_config.json` and
filled from safetensors: it computes what open_clip computes. That matters where a repository holds the weights of
another one: timm's copies of SigLIP run an exact GELU in most towers where the original, and transformers, run the tanh
approximation, and all of them drop punctuation, which SigLIP 2 was trained with.

A configuration is data: a timm model in it must be of timm's registry, nothing is downloaded, no setting chooses code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from vlm.checkpoints.checks import guarded
from vlm.checkpoints.files import read_json
from vlm.checkpoints.image_settings import OWN_TRANSFORM
from vlm.checkpoints.source import Source
from vlm.checkpoints.weights import Weights
from vlm.encoders import open_clip as tower
from vlm.errors import CheckpointError, ConfigError
from vlm.files import write_json
from vlm.images.fused import open_transform
from vlm.images.transforms import ImageTransform
from vlm.model.dual import OBJECTIVES, DualTower
from vlm.siglip.filling import fill
from vlm.siglip.open_clip_texts import OpenClipProcessor, check_rows, open_cutter, rule_of

CONFIG_FILE = tower.CONFIG_FILE
WEIGHTS = (tower.WEIGHTS, "open_clip_pytorch_model.safetensors", "model.safetensors")
"""Names of the weights, in the library's own order."""
SETTINGS = (
    *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"),
    *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),
)
"""What `model_cfg` may hold."""
OLD_TEXT = ("positional_embedding", "text_projection", "token_embedding.", "transformer.", "ln_final.")
"""How names of the text tower began before it was a module of its own."""


class Config(PreTrainedConfig):
    """`model_cfg` of `open_clip_config.json`, as it is; the image settings beside it are the processor's."""

    model_type = "open_clip"

    model_cfg: Any = None


class OpenClipTower(DualTower):
    """open_clip's `CLIP` or `CustomTextCLIP` behind the methods of a `DualTower`."""

    def __init__(self, config: Config) -> None:
        """
        Raises:
            ConfigError: open_clip is missing, or a setting that it does not know or that would run code.
        """
        nn.Module.__init__(self)
        settings = checked(config.model_cfg)
        sigmoid = settings.get("init_logit_bias") is not None
        self.kind = "open_clip"
        self.config = config
        self.family = "open_clip_siglip" if sigmoid else "open_clip"
        self.trained_with = "sigmoid" if sigmoid else "softmax"
        self.objective = OBJECTIVES[self.trained_with]
        self.embedding_size = int(settings["embed_dim"])
        module = tower.library().model
        kind = module.CustomTextCLIP if settings.pop("custom_text", False) else module.CLIP
        try:
            self.model = kind(**settings)
        except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
            raise ConfigError(f"open_clip cannot build the model: {error}") from error
        tower.without(self.model, ())  # the counters of batch norms

    @property
    def context(self) -> int:
        """Positions of the text tower: the rows of its position table."""
        return int(_text(self).positional_embedding.shape[0])

    @property
    def attention(self) -> str:
        """The library has one of its own."""
        return "open_clip's own"

    def image_features(self, pixel_values: Tensor, **naflex: Tensor) -> Tensor:
        """float[B, D]"""
        features: Tensor = self.model.encode_image(pixel_values)
        return features

    def text_features(self, input_ids: Tensor) -> Tensor:
        """float[C, D]"""
        features: Tensor = self.model.encode_text(input_ids)
        return features


def _text(model: OpenClipTower) -> Any:
    """The text tower: a module of its own, or the model itself."""
    return getattr(model.model, "text", model.model)


def checked(model_cfg: Any) -> dict[str, Any]:
    """`model_cfg` with known settings of plain values, and nothing to download.

    Raises:
        ConfigError: names the setting.
    """
    if not isinstance(model_cfg, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(model_cfg):
        raise ConfigError("model_cfg has no embed_dim, vision_cfg and text_cfg; it describes no two towers")
    if "multimodal_cfg" in model_cfg:
        raise ConfigError("model_cfg has a multimodal_cfg: CoCa, whose text decoder is not read here")
    for key, value in model_cfg.items():
        if key not in SETTINGS or not tower.plain(value):
            raise ConfigError(f"model_cfg.{key} is {value!r}; read here: {', '.join(SETTINGS)}, of plain values")
    text = model_cfg["text_cfg"]
    known = [field.name for field in fields(tower.library().model.CLIPTextCfg)]
    for key in text:
        if key not in known:
            raise ConfigError(f"text_cfg.{key} is {text[key]!r}; open_clip knows {', '.join(known)}")
    if text.get("hf_model_name"):
        raise ConfigError(
            f"text_cfg.hf_model_name is {text['hf_model_name']!r}: a text tower of transformers inside open_clip, which"
            f" would be downloaded and masks its padding, is not read; use open_clip itself"
        )
    return {**model_cfg, "vision_cfg": tower.checked(model_cfg["vision_cfg"])}


def load(
    folder: Path,
    *,
    origin: str,
    dtype: str | torch.dtype | None = None,
    tokenizer: Any = None,
    allow_nonfinite: bool = False,
) -> tuple[DualTower, OpenClipProcessor]:
    """A directory as open_clip writes it for the Hub; arguments as for `vlm.siglip.load`.

    Args:
        origin: the path, for messages.

    Raises:
        CheckpointError: files or tensors that are missing, unexpected, mis-shaped or not finite.
        ConfigError: open_clip is missing, or a setting that is not read here.
    """
    values = read_json(folder / CONFIG_FILE)
    config = Config(model_cfg=values.get("model_cfg"))
    with init_empty_weights(include_buffers=False):
        model = OpenClipTower(config)
    fill(model, _source(folder, model, origin), dtype=dtype, allow_nonfinite=allow_nonfinite)
    text_cfg = config.model_cfg["text_cfg"]
    cutter = open_cutter(folder, text_cfg, tokenizer)
    rule = rule_of(cutter, text_cfg, sigmoid=model.objective.biased)
    if cutter is not None:
        check_rows(cutter, rule, text_cfg, origin)
    own = values.get(OWN_TRANSFORM)
    transform = guarded(
        lambda: _transform(model, values.get("preprocess_cfg") or {}) if own is None else open_transform(own),
        str(folder / CONFIG_FILE),
    )
    return model, OpenClipProcessor(transform, cutter, rule, model.context, len(_text(model).token_embedding.weight))


def _source(folder: Path, model: OpenClipTower, origin: str) -> Source:
    """The weights under the names of the library's model of today, without counters of batch norms."""
    name = next((name for name in WEIGHTS if (folder / name).exists()), None)
    if name is None:
        raise CheckpointError(
            f"{folder}: no {WEIGHTS[0]}; only safetensors are read (pickled weights: `vlm import SOURCE --from-pickle"
            f" --out DIR` converts them)"
        )
    stored = Weights(folder, name).source(origin)
    names = {key: key for key in stored.shapes if not key.endswith("num_batches_tracked")}
    if hasattr(model.model, "text") and not any(key.startswith("text.") for key in names):
        names = {f"text.{key}" if key.startswith(OLD_TEXT) else key: key for key in names}
    return Source(
        origin,
        {new: stored.shapes[old] for new, old in names.items()},
        {new: stored.dtypes[old] for new, old in names.items()},
        lambda new: stored.read(names[new]),
    )


def _transform(model: OpenClipTower, image: Mapping[str, Any]) -> ImageTransform:
    """The library's evaluation transform at the image tower's size."""
    visual = model.model.visual
    size = visual.image_size
    sides = {int(side) for side in (size if isinstance(size, tuple | list) else (size,))}
    if len(sides) != 1:
        raise ConfigError(f"the image tower reads images of {size}, only squares are read here")
    trunk = getattr(visual, "trunk", visual)
    patches = getattr(getattr(trunk, "patch_embed", trunk), "patch_size", None) or 32  # a ConvNet's cell
    patch = patches[0] if isinstance(patches, tuple | list) else patches
    settings = {key: image[key] for key in tower.IMAGE if image.get(key) is not None}
    for key in ("mean", "std"):
        if isinstance(settings.get(key), int | float):
            settings[key] = (settings[key],) * 3
    return tower.transform(tower.Config(image_size=sides.pop(), patch_size=int(patch), **settings))


def write(model: DualTower, processor: Any, folder: Path) -> None:
    """Write both towers as open_clip writes them for the Hub; `load` opens them as they were, bit for bit."""
    transform = processor.transform
    modes = {ours: theirs for theirs, ours in tower.MODES.items()}
    image = {"size": transform.image_size, "mean": list(transform.mean), "std": list(transform.std)}
    image |= {"interpolation": transform.resample, "resize_mode": modes.get(transform.mode, "squash")}
    colours = [int(value) for value in transform.background]
    image["fill_color"] = colours[0] if len(set(colours)) == 1 else colours
    values = {"model_cfg": model.config.model_cfg, "preprocess_cfg": image, OWN_TRANSFORM: transform.to_dict()}
    write_json(folder / CONFIG_FILE, values)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.model.state_dict().items()}
    save_file(tensors, folder / tower.WEIGHTS, metadata={"format": "pt"})
    if processor.tokenizer is not None:
        processor.tokenizer.save_pretrained(folder)


def recognise(folder: Path) -> bool:
    """Whether a directory is open_clip's. One that holds the same model for transformers too is read as that."""
    if not (folder / CONFIG_FILE).is_file():
        return False
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return "text_config" not in config
