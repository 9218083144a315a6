"""`Processor`: images and texts to a `Batch`, and ids back to text. Training, evaluation, generation and the command
line all use this one."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import cached_file

from vlm.errors import CheckpointError, ConfigError, DataError, ImageError
from vlm.files import disk_errors, publishing, rust_disk_errors
from vlm.images.fused import open_transform
from vlm.images.load import ImageInput, load_image
from vlm.images.transforms import ImageTransform, Pixels
from vlm.model import samples
from vlm.model.batch import Batch
from vlm.model.loss import IGNORE
from vlm.model.masks import position_ids
from vlm.model.projecting import counter
from vlm.text import control
from vlm.text.prompts import EncodedText, PromptEncoder
from vlm.text.tokenizer import Tokenizer, image_token_id

logger = logging.getLogger(__name__)
CONFIG_NAME = "processor_config.json"
FILES = (CONFIG_NAME, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")
"""What a processor's files are called; those of an earlier one give way."""
DEFAULT_PROJECTOR = {"kind": "linear"}
ImageSource = ImageInput


def not_a_processors(name: str) -> bool:
    """Whether a file is none of a processor's."""
    return not any(fnmatch(name, pattern) for pattern in FILES)


class Processor:
    """The only place that knows prompts, placeholders, padding sides and pixels.

    Args:
        tokenizer: a Gemma tokenizer with an `<image>` token.
        image_transform: how images become tensors (belongs to the vision tower).
        projector: `{"kind": ..., **settings}`, the model's `projector_config`: it decides how many placeholders an
            image gets. None is `linear`, one per patch.

    Raises:
        ConfigError: an unknown projector or setting, or a tokenizer without `<image>`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_transform: ImageTransform | dict[str, Any],
        projector: dict[str, Any] | None = None,
    ) -> None:
        if isinstance(image_transform, dict):
            image_transform = open_transform(image_transform)
        self.tokenizer = tokenizer
        self.image_transform = image_transform
        self.projector = DEFAULT_PROJECTOR if projector is None else projector
        self._num_tokens = counter(self.projector)
        self.image_token_id = image_token_id(tokenizer)
        self._encode = PromptEncoder(tokenizer)

    def __call__(
        self,
        images: Sequence[ImageSource | Sequence[ImageSource] | None] | None = None,
        text: Sequence[str] | str = (),
        suffix: Sequence[str] | str | None = None,
        *,
        ids: Sequence[str] | None = None,
        max_text_length: int | None = None,
        grids: Sequence[Sequence[tuple[int, int]]] | None = None,
        strip_control: bool = False,
    ) -> Batch:
        """Build a batch: for training when suffixes are given (padding right, labels), else for generation (padding
        left, no labels).

        Args:
            images: for each sample one image (what `vlm.load_image` reads: a path, bytes, Pillow image, array or
                tensor), a list of images, or None or an empty list where it is about text alone; None for a batch of
                text alone.
            text: for each sample the prefix, such as `caption en`. `<image>` is never written by the user: placeholders
                are inserted here.
            suffix: for each sample the target text, or None.
            ids: names of the samples for error messages; their numbers by default.
            max_text_length: most text tokens of a sample (BOS, newline, EOS included; image tokens not). Only a suffix
                is cut, and that is reported.
            grids: instead of `images`, for each sample the (rows, columns) of its images, whose features are there
                already (`VLM.forward(encoded=...)`): the batch has their placeholders, and no pixels.
            strip_control: remove control spellings (`<image>`, `<bos>`, `[INST]`, a newline at the end of a prompt; see
                `vlm.text.control`) from the texts. They stay text otherwise, and are told once.

        Raises:
            DataError: an empty batch, unequal lengths, a prefix that does not fit, nothing to supervise. The sample is
                named. Or images and grids together.
            ImageError: an image that cannot be used.
        """
        if images is not None and grids is not None:
            raise DataError(
                "images beside grids: grids are of images whose features are there already; pass one of them"
            )
        prefixes = [text] if isinstance(text, str) else list(text)
        suffixes = [suffix] if isinstance(suffix, str) else None if suffix is None else list(suffix)
        prefixes = control.checked(prefixes, strip=strip_control)
        suffixes = None if suffixes is None else control.checked(suffixes, prompt=False, strip=strip_control)
        names = [str(i) for i in range(len(prefixes))] if ids is None else [str(i) for i in ids]
        groups = samples.image_groups(images, len(prefixes)) if grids is None else []
        samples.check_lengths(prefixes, suffixes, names, groups if grids is None else list(grids))
        pixels = self._pixels(groups, names) if grids is None else None
        targets: Sequence[str | None] = [None] * len(prefixes) if suffixes is None else suffixes
        texts = [
            self._encode(prefix, target, sample=name, max_length=max_text_length)
            for prefix, target, name in zip(prefixes, targets, names, strict=True)
        ]
        if grids is None:
            counts = self._image_tokens(groups, pixels)
        else:
            counts = [sum(self.num_image_tokens(grid) for grid in group) for group in grids]
        batch = self._assemble(texts, counts, names, training=suffixes is not None)
        if batch.truncated:
            logger.warning("suffix cut to %s text tokens in %s", max_text_length, ", ".join(batch.truncated))
        if pixels is None:
            return batch
        return replace(
            batch,
            pixel_values=pixels.pixel_values,
            pixel_attention_mask=pixels.pixel_attention_mask,
            spatial_shapes=pixels.spatial_shapes,
        )

    def lengths(
        self,
        image_sizes: Sequence[Sequence[tuple[int, int]]],
        text: Sequence[str],
        suffix: Sequence[str] | None = None,
        *,
        ids: Sequence[str] | None = None,
        max_text_length: int | None = None,
    ) -> list[int]:
        """Tokens that each sample will have in a batch, padding left out, without decoding images.

        Args:
            image_sizes: for each sample the (width, height) of its images, as `vlm.images.image_size` gives them.
            text, suffix, ids, max_text_length: as for a batch.

        Raises:
            DataError: a prefix or suffix that a batch would refuse too.
        """
        names = [str(i) for i in range(len(text))] if ids is None else list(ids)
        targets: Sequence[str | None] = [None] * len(text) if suffix is None else suffix
        lengths = []
        for sizes, prefix, target, name in zip(image_sizes, text, targets, names, strict=True):
            encoded = self._encode(prefix, target, sample=name, max_length=max_text_length)
            image = sum(self.num_image_tokens(self.image_transform.grid(height, width)) for width, height in sizes)
            lengths.append(image + len(encoded.prefix) + len(encoded.suffix))
        return lengths

    def num_image_tokens(self, grid: tuple[int, int]) -> int:
        """Placeholders for an image with this (rows, columns) patch grid."""
        return self._num_tokens(grid)

    @property
    def max_image_tokens(self) -> int:
        """The most placeholders that one image can get. With a NaFlex tower that may be a long and narrow one, where
        blocks of patches end part empty."""
        return max(self.num_image_tokens(grid) for grid in self.image_transform.widest_grids())

    def batch_decode(self, ids: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Generated ids (without the prompt) to text: up to the first EOS, special tokens dropped, `<loc>` and `<seg>`
        kept."""
        return [self.decode(row) for row in ids]

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Generated ids of one sample to text."""
        row = [int(i) for i in ids]
        if self.tokenizer.eos_token_id in row:
            row = row[: row.index(self.tokenizer.eos_token_id)]
        return self.tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _pixels(self, groups: list[list[ImageSource]], names: list[str]) -> Pixels | None:
        loaded = [self._load(image, name) for group, name in zip(groups, names, strict=True) for image in group]
        return self.image_transform(loaded) if loaded else None

    def _load(self, image: ImageSource, name: str) -> Image.Image:
        try:
            return load_image(image, background=self.image_transform.background)
        except ImageError as error:
            raise ImageError(error.code, f"sample {name!r}: {error}") from error

    def _image_tokens(self, groups: list[list[ImageSource]], pixels: Pixels | None) -> list[int]:
        grids = iter(pixels.grids if pixels is not None else [])
        return [sum(self.num_image_tokens(next(grids)) for _ in group) for group in groups]

    def _assemble(self, texts: list[EncodedText], image_tokens: list[int], names: list[str], training: bool) -> Batch:
        lengths = [count + len(t.prefix) + len(t.suffix) for count, t in zip(image_tokens, texts, strict=True)]
        shape = (len(texts), max(lengths))
        input_ids = torch.full(shape, self.tokenizer.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        token_type_ids = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE, dtype=torch.int64)
        for row, (count, encoded) in enumerate(zip(image_tokens, texts, strict=True)):
            start = 0 if training else shape[1] - lengths[row]
            end = start + lengths[row]
            ids = torch.tensor([self.image_token_id] * count + encoded.prefix + encoded.suffix)
            boundary = end - len(encoded.suffix)
            input_ids[row, start:end] = ids
            attention_mask[row, start:end] = 1
            token_type_ids[row, boundary:end] = 1
            labels[row, boundary:end] = ids[len(ids) - len(encoded.suffix) :]
        return Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids(attention_mask),
            labels=labels if training else None,
            ids=names,
            truncated=[name for name, t in zip(names, texts, strict=True) if t.truncated],
        )

    def save_pretrained(self, path: str | Path, **kwargs: Any) -> list[str]:
        """Write `processor_config.json` and the tokenizer files into a directory, in one step; others there stay.

        Raises:
            DiskError: the disk refuses; the directory is as it was.
        """
        with disk_errors(path), publishing(path, keep=not_a_processors) as staging:
            written = self.write(staging)
        return [str(Path(path) / name) for name in written]

    def write(self, folder: Path) -> list[str]:
        """Write the processor's files into a directory that is being made; returns their names."""
        values = {
            "processor_class": type(self).__name__,
            "image_transform": self.image_transform.to_dict(),
            "projector": self.projector,
        }
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
        with rust_disk_errors():
            return [CONFIG_NAME, *(Path(file).name for file in self.tokenizer.save_pretrained(folder))]

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> Processor:
        """Open what `save_pretrained` wrote: a directory or a hub id.

        Raises:
            CheckpointError: there is no processor, or it is not one of this library.
        """
        names = ("cache_dir", "local_files_only", "token", "subfolder", "revision")
        hub: dict[str, Any] = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        found = cached_file(str(path), CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub)
        if found is None:
            raise CheckpointError(
                f"{path}: no {CONFIG_NAME}; save the processor beside the model with processor.save_pretrained"
            )
        values = json.loads(Path(found).read_text(encoding="utf-8"))
        if "image_transform" not in values:
            raise CheckpointError(
                f"{path}: {CONFIG_NAME} has no image_transform; it was written by {values.get('processor_class')!r},"
                f" expected a processor saved by vlm"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, **hub)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: no tokenizer that can be opened; save the processor again ({error})"
            ) from error
        try:
            # A file from before there was a choice has no projector.
            return cls(tokenizer, values["image_transform"], values.get("projector"))
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from error
