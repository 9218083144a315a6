"""Our own models: `generate` for images and prompts in memory, and `ModelPredictor` for whoever has an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from PIL import Image

from vlm.data.examples import Example
from vlm.data.problems import Problem
from vlm.errors import GenerationError
from vlm.generation import text as writing
from vlm.generation.decoding import Decoding, Normalization, check_count
from vlm.generation.engine import Engine
from vlm.generation.likelihood import score_candidates
from vlm.generation.predictor import Answer, Pictures
from vlm.generation.request import Request
from vlm.generation.schedule import Batching
from vlm.images.load import is_image
from vlm.model import lengths
from vlm.model.dtypes import check_dtype
from vlm.model.forward import VLM
from vlm.model.processor import ImageSource, Processor
from vlm.model.samples import image_groups
from vlm.settings import by_field
from vlm.text import control

BATCH_SIZE = 16


def generate(
    model: VLM,
    processor: Processor,
    images: Sequence[ImageSource | Sequence[ImageSource] | None] | ImageSource | None,
    prompts: Sequence[str] | str,
    *,
    decoding: Decoding | None = None,
    ids: Sequence[str] | None = None,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    force_fp16: bool = False,
    strip_control: bool = False,
    **options: Any,
) -> list[Answer]:
    """Answer a prompt about each image.

    Args:
        images: for each prompt one image, a list of images (what `vlm.load_image` reads), or None where it is about
            text alone; None for text alone everywhere.
        prompts: prefixes such as `caption en` or `answer en what colour is the square?`.
        decoding: how answers are made; or its options by their names:
            `max_new_tokens`: most tokens generated for a sample (64).
            `num_beams`: 1 is greedy (or sampling); more is beam search. `beam_search`: `transformers`, or `big_vision`
            for the rule that PaliGemma's published results were decoded with: the highest sum of log-probabilities (see
            `vlm.generation.beam`). With one beam both are greedy. `length_penalty`: of `transformers` beams only.
            `do_sample`, `temperature`, `top_p`, `top_k`: sampling; `top_k=0` means no limit; `seed` makes it
            repeatable.
        ids: names of the samples for error messages.
        batch_size: samples at a time, 16 if not given; it does not change greedy results beyond floating-point
            rounding.
        batch_tokens: instead of `batch_size`, as many samples at a time as have at most so many image and prompt
            tokens, padding included and once for each beam; similar lengths together. A sample that is longer goes
            alone.
        force_fp16: run a float16 model although it may overflow.
        strip_control: remove control spellings such as `<image>` from the prompts (`vlm.text.control`).

    Returns:
        one text per prompt, in order, special tokens removed; its `finish` says whether the model ended it or
        `max_new_tokens` did.

    Raises:
        GenerationError: float16; settings that contradict each other, or that this way of decoding would not read
            (`temperature` without `do_sample`, `length_penalty` without beams). DataError, ImageError: as `Processor`
            raises them, and for a prompt that leaves no room in the model's context.
    """
    check_dtype(model.config, model.dtype, force=force_fp16)
    how = _decoding(decoding, options)
    batching = _batching(batch_size, batch_tokens, how.num_beams)
    prompts = control.checked([prompts] if isinstance(prompts, str) else list(prompts), strip=strip_control)
    images = [images] if is_image(images) else images
    names = _names(images, prompts, ids)
    groups = image_groups(images, len(prompts))
    requests = [
        Request(id=name, prompt=prompt, images=group, key=place)
        for place, (name, prompt, group) in enumerate(zip(names, prompts, groups, strict=True))
    ]
    predictor = ModelPredictor(model, processor, name=type(model).__name__, force_fp16=force_fp16)
    engine = Engine(predictor=predictor, decoding=how, batching=batching, strict=True)
    texts = [Answer("", "eos")] * len(prompts)
    with torch.random.fork_rng(enabled=how.seed is not None):
        if how.seed is not None:
            torch.manual_seed(how.seed)
        for reply in chain.from_iterable(engine.run(requests)):
            assert isinstance(reply.text, Answer)
            texts[reply.request.key] = reply.text
    return texts


def _decoding(decoding: Decoding | None, options: Mapping[str, Any]) -> Decoding:
    """The options of `generate`. Raises `GenerationError`, and `TypeError` for a name that none has."""
    (own,) = by_field("generate", options, Decoding)
    how = replace(decoding or Decoding(), **own)
    if how.by != "generate":
        raise GenerationError(f"by={how.by!r}: this writes text; vlm.generation.score_candidates scores candidates")
    return how


def _batching(batch_size: int | None, batch_tokens: int | None, num_beams: int) -> Batching:
    if batch_size is not None and batch_tokens is not None:
        raise GenerationError(f"batch_size={batch_size} beside batch_tokens={batch_tokens}; pass one of the two")
    check_count("batch_size", BATCH_SIZE if batch_size is None else batch_size)
    if batch_tokens is not None:
        check_count("batch_tokens", batch_tokens)
    return Batching(
        size=batch_size or BATCH_SIZE,
        tokens=batch_tokens,
        beams=num_beams,
        order="given",
        advice="give a smaller batch size",
    )


def _names(images: Sequence[Any] | None, prompts: list[str], ids: Sequence[str] | None) -> list[str]:
    """The samples' names. Raises `GenerationError` unless there is one image and one id per prompt."""
    names = [str(i) for i in range(len(prompts))] if ids is None else [str(i) for i in ids]
    counts = {"prompts": len(prompts), "ids": len(names)}
    if images is not None:
        counts["images"] = len(images)
    if len(set(counts.values())) > 1:
        raise GenerationError(f"each prompt needs one image and one id, got {counts}")
    return names


class ModelPredictor:
    """A `vlm` model with its processor, one batch at a time.

    Args:
        model, processor: what `vlm.load` returns.
        name: what reports call it, such as the directory it came from.
        identity: of model and processor, for who keeps what they have said: `vlm.checkpoints.identity.of_model`.
        force_fp16: run a float16 model although it may overflow.
    """

    def __init__(
        self,
        model: VLM,
        processor: Processor,
        *,
        name: str,
        identity: Callable[[VLM, Processor], Mapping[str, Any]] | None = None,
        force_fp16: bool = False,
    ) -> None:
        self.model = model
        self.processor = processor
        self.name = name
        self.force_fp16 = force_fp16
        self._identity = identity
        self._room = lengths.Room(processor=processor, context=lengths.context_of(model.config))

    @property
    def background(self) -> tuple[int, int, int]:
        return self.processor.image_transform.background

    @property
    def device(self) -> str:
        return str(self.model.device)

    def identity(self) -> dict[str, Any]:
        """What decides the predictions, and the image transform in words. Raises `GenerationError` without one."""
        if self._identity is None:
            raise GenerationError(
                "this predictor was made without identity=...; vlm.checkpoints.identity.of_model tells models apart"
            )
        images = self.processor.image_transform.describe()
        return {**self._identity(self.model, self.processor), "images": images}

    def lengths(
        self, image_sizes: Sequence[Sequence[tuple[int, int]]], prompts: Sequence[str], *, ids: Sequence[str]
    ) -> list[int]:
        """Image and prompt tokens of each item, from the (width, height) of its images."""
        return self.processor.lengths(image_sizes, prompts, ids=ids)

    def misfit(self, id: str, prompt: str, images: Sequence[Any]) -> str | None:
        """Why prompt and images leave no room for a token in the model's context, or None."""
        return lengths.misfit(id, prompt, images, self._room)

    def too_long(self, examples: Sequence[Example], answers: Callable[[Example], Sequence[str]]) -> dict[int, Problem]:
        """Position of an example -> why it does not fit with any of its `answers`, or with one token if it has none."""
        return lengths.too_long(examples, self._room, answers)

    def predict(
        self, images: Sequence[Pictures], prompts: Sequence[str], *, ids: Sequence[str], decoding: Decoding
    ) -> list[Answer]:
        """One batch. `seed` is the caller's to set: it is about a whole run."""
        check_dtype(self.model.config, self.model.dtype, force=self.force_fp16)
        batch = self.processor(images, list(prompts), ids=ids)
        settings = writing.generation_config(self.processor, decoding)
        new = writing.generate_ids(self.model, batch, settings, beam_search=decoding.beam_search)
        ended = torch.isin(new, torch.tensor(settings.eos_token_id, device=new.device)).any(dim=1).tolist()
        texts = self.processor.batch_decode(new)
        return [Answer(text, "eos" if whole else "length") for text, whole in zip(texts, ended, strict=True)]

    def score(
        self,
        images: Sequence[list[Image.Image]],
        prompts: Sequence[str],
        candidates: Sequence[Sequence[str]],
        *,
        ids: Sequence[str],
        normalization: Normalization,
    ) -> list[list[float]]:
        """Log-likelihoods of the candidates of each prompt; see `vlm.generation.likelihood`."""
        return score_candidates(
            self.model,
            self.processor,
            images,
            prompts,
            candidates,
            normalization=normalization,
            batch_size=len(prompts),
            ids=ids,
            force_fp16=self.force_fp16,
        )
