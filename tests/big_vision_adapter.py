"""The project's public code behind the names and shapes of big_vision: numpy in, numpy out, no mathematics of its own.

A checker of golden cases, made by running Google's original code, imports this file and compares. `params` is
{big_vision name: array}; `config` the settings that the original ran with; `batch` its inputs: image float32[B, H, W,
3] in [-1, 1], text int32[B, L], mask_ar (0 = prefix, 1 = suffix), mask_loss, and the prefix alone as prefix_text with
prefix_mask_input.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

from vlm.checkpoints import big_vision, big_vision_model
from vlm.encoders._positions import resize_position_grid
from vlm.encoders.siglip import resample_position_table
from vlm.generation.text import generate_ids
from vlm.images.patches import patch_coordinates
from vlm.images.transforms import ImageTransform, naflex_grid
from vlm.model.batch import Batch
from vlm.model.dual import TwoTowerOutput
from vlm.model.forward import VLM
from vlm.model.loss import IGNORE
from vlm.siglip.loading import from_big_vision

Arrays = dict[str, np.ndarray]
Config = dict[str, Any]


def tensor(array: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


def pixels(batch: Arrays) -> Tensor:
    return tensor(batch["image"], torch.float32).permute(0, 3, 1, 2)


class PaliGemma:
    """A model under test and the golden inputs in its terms."""

    def __init__(self, params: Arrays, config: Config) -> None:
        llm = {**config["llm"], **config.get("llm_kw", {})}
        self.model: VLM = big_vision_model.paligemma_model(params, config["image_token"], llm=llm)
        self.shapes = {name: array.shape for name, array in params.items()}

    def image_features(self, batch: Arrays) -> np.ndarray:
        with torch.no_grad():
            tokens, counts = self.model.model.image_tokens(pixels(batch))
        return tokens.reshape(len(counts), -1, tokens.shape[-1]).numpy()

    def text_embeddings(self, batch: Arrays) -> np.ndarray:
        with torch.no_grad():
            embeddings: Tensor = self.model.get_input_embeddings()(tensor(batch["text"][:, :-1]))
        return embeddings.numpy()

    def text_logits(self, batch: Arrays) -> np.ndarray:
        return self._logits(batch, softcap=False)

    def text_logits_capped(self, batch: Arrays) -> np.ndarray:
        return self._logits(batch, softcap=True)

    def _logits(self, batch: Arrays, softcap: bool) -> np.ndarray:
        inputs = self._inputs(batch["text"][:, :-1], batch.get("mask_ar"), batch)
        self.model.config.softcap_in_generation = softcap
        with torch.no_grad():
            logits = self.model(**inputs).logits
        self.model.config.softcap_in_generation = True
        return logits[:, -(batch["text"].shape[1] - 1) :].numpy()

    def loss(self, batch: Arrays) -> float:
        with torch.no_grad():
            return float(self._loss(batch))

    def grads(self, batch: Arrays) -> Arrays:
        self.model.zero_grad()
        self._loss(batch).backward()
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return big_vision.encode(gradients, self.shapes, two_towers=False)

    def _loss(self, batch: Arrays) -> Tensor:
        inputs = self._inputs(batch["text"], batch["mask_ar"], batch)
        targets = np.where(batch["mask_loss"] > 0, batch["text"], IGNORE)
        labels = torch.full_like(inputs["input_ids"], IGNORE)
        labels[:, -targets.shape[1] :] = tensor(targets)
        loss: Tensor = self.model(**inputs, labels=labels, reduction="example").loss
        return loss

    def greedy(self, batch: Arrays, n: int, eos: int) -> np.ndarray:
        return self._generate(batch, n, eos, 1)

    def beam(self, batch: Arrays, n: int, eos: int, beams: int) -> np.ndarray:
        return self._generate(batch, n, eos, beams)

    def _generate(self, batch: Arrays, n: int, eos: int, beams: int) -> np.ndarray:
        rows = []
        for index in range(len(batch["image"])):
            text = batch["prefix_text"][index][batch["prefix_mask_input"][index] > 0][None]
            inputs: dict[str, Any] = self._inputs(
                text, np.zeros_like(text), {"image": batch["image"][index : index + 1]}
            )
            prompt = Batch(**inputs, position_ids=torch.arange(inputs["input_ids"].shape[1])[None])
            settings = GenerationConfig(
                max_new_tokens=n, num_beams=beams, do_sample=False, eos_token_id=eos, pad_token_id=0
            )
            found = generate_ids(self.model, prompt, settings, beam_search="big_vision")[0].tolist()
            rows.append(found + [0] * (n - len(found)))
        return np.array(rows)

    def _inputs(self, text: np.ndarray, mask_ar: np.ndarray | None, batch: Arrays) -> dict[str, Tensor]:
        """Image placeholders, then the text; the image and the tokens whose mask_ar is 0 are the prefix."""
        ids = tensor(text)
        placeholder: Any = self.model.config.image_token_id
        image = torch.full((len(ids), self._image_tokens()), placeholder)
        types = torch.ones_like(ids) if mask_ar is None else tensor(mask_ar)[:, : ids.shape[1]]
        input_ids = torch.cat([image, ids], dim=1)
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "token_type_ids": torch.cat([torch.zeros_like(image), types], dim=1),
            "pixel_values": pixels(batch),
        }

    def _image_tokens(self) -> int:
        vision = self.model.config.vision_config
        rows, columns = ImageTransform(mode="squash", image_size=vision.image_size, patch_size=vision.patch_size).grid(
            0, 0
        )
        return int(self.model.model.multi_modal_projector.num_tokens((rows, columns)))


class TwoTowers:
    """A SigLIP model under test."""

    def __init__(self, params: Arrays, config: Config) -> None:
        self.model = from_big_vision(params)
        self.shapes = {name: array.shape for name, array in params.items()}

    def image_pooled(self, batch: Arrays) -> np.ndarray:
        pixel_values, naflex = self._images(batch)
        return self.model.encode_image(pixel_values, normalize=False, **naflex).detach().numpy()

    def text_pooled(self, batch: Arrays) -> np.ndarray:
        return self.model.encode_text(tensor(batch["text"]), normalize=False).detach().numpy()

    def logits(self, batch: Arrays) -> np.ndarray:
        return self._forward(batch).logits.detach().numpy()

    def loss_and_grads(self, batch: Arrays) -> tuple[float, Arrays]:
        self.model.zero_grad()
        loss = self._forward(batch).loss
        assert loss is not None
        loss.backward()
        gradients = {name: p.grad for name, p in self.model.model.named_parameters() if p.grad is not None}
        return float(loss.detach()), big_vision.encode(gradients, self.shapes, two_towers=True)

    def _forward(self, batch: Arrays) -> TwoTowerOutput:
        pixel_values, naflex = self._images(batch)
        return self.model(pixel_values, tensor(batch["text"]), **naflex)

    def _images(self, batch: Arrays) -> tuple[Tensor, dict[str, Tensor]]:
        if self.model.kind == "siglip":
            return pixels(batch), {}
        naflex = {"pixel_attention_mask": tensor(batch["type"]), "spatial_shapes": tensor(batch["grids"])}
        return tensor(batch["patches"], torch.float32), naflex


paligemma = PaliGemma
siglip = TwoTowers
naflex = TwoTowers


def posemb(grid: np.ndarray, h: int, w: int) -> np.ndarray:
    return resize_position_grid(tensor(grid, torch.float32), h, w).numpy()


def resample_posemb(grid: np.ndarray, b: int) -> np.ndarray:
    return resample_position_table(tensor(grid, torch.float32)[0], b * b).numpy()[None]


def naflex_size(h: int, w: int, patch: int, max_patches: int) -> tuple[int, int]:
    rows, columns = naflex_grid(h, w, patch, max_patches)
    return rows * patch, columns * patch


def resize(image: np.ndarray, size: int, antialias: bool) -> np.ndarray:
    transform = ImageTransform(
        mode="squash", image_size=size, patch_size=1, resample="bilinear", antialias=antialias, rounding="down"
    )
    return transform([Image.fromarray(image)]).pixel_values[0].permute(1, 2, 0).numpy()


def naflex_pp(image: np.ndarray, patch: int, max_patches: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    transform = ImageTransform(mode="naflex", patch_size=patch, max_num_patches=max_patches, resample="bilinear")
    out = transform([Image.fromarray(image)])
    y, x = patch_coordinates(*out.grids[0])
    return out.pixel_values[0].numpy(), y.numpy(), x.numpy()
