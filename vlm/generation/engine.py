"""Images and prompts to text, through transformers' `generate` with our masks, positions and padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from transformers import GenerationConfig

from vlm.data.budget import cut
from vlm.errors import DataError, GenerationError, ImageError, nearest
from vlm.generation.beam import beam_search as big_vision_beams
from vlm.images.load import image_size, is_image
from vlm.model.batch import Batch
from vlm.model.config import VLMConfig
from vlm.model.dtypes import check_dtype
from vlm.model.forward import VLM
from vlm.model.lengths import context_of, over_context
from vlm.model.processor import ImageSource, Processor
from vlm.text import control

BeamSearch = Literal["transformers", "big_vision"]
"""Whose rule of beam search: transformers' (normalised by length), or PaliGemma's own (`vlm.generation.beam`)."""

Finish = Literal["eos", "length"]


class Answer(str):
    """A generated text that knows how it ended.

    Attributes:
        finish: `eos`, the model had said all; `length`, it was cut at `max_new_tokens`.
    """

    finish: Finish

    def __new__(cls, text: str, finish: Finish) -> Answer:
        self = super().__new__(cls, text)
        self.finish = finish
        return self

    def __getnewargs__(self) -> tuple[str, Finish]:  # type: ignore[override]  # copies and pickles keep `finish`
        return str(self), self.finish


def generate(
    model: VLM,
    processor: Processor,
    images: Sequence[ImageSource | Sequence[ImageSource] | None] | ImageSource | None,
    prompts: Sequence[str] | str,
    *,
    ids: Sequence[str] | None = None,
    max_new_tokens: int = 64,
    num_beams: int = 1,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    length_penalty: float = 1.0,
    beam_search: BeamSearch = "transformers",
    seed: int | None = None,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    force_fp16: bool = False,
    strip_control: bool = False,
) -> list[Answer]:
    """Answer a prompt about each image.

    Args:
        images: for each prompt one image, a list of images (what `vlm.load_image` reads), or None where it is about
            text alone; None for text alone everywhere.
        prompts: prefixes such as `caption en` or `answer en what colour is the square?`.
        ids: names of the samples for error messages.
        max_new_tokens: most tokens generated for a sample.
        num_beams: 1 is greedy (or sampling); more is beam search.
        beam_search: `transformers`, or `big_vision` for the rule that PaliGemma's published results were decoded with:
            the highest sum of log-probabilities (see `vlm.generation.beam`). With one beam both are greedy.
        length_penalty: of `transformers` beams only.
        do_sample, temperature, top_p, top_k: sampling; `top_k=0` means no limit. `seed` makes it repeatable.
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
    settings = generation_config(
        processor,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=do_sample,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        length_penalty=length_penalty,
    )
    check_beam_search(beam_search, do_sample=do_sample, length_penalty=length_penalty)
    if seed is not None and not do_sample:
        raise GenerationError(f"seed={seed} without do_sample=True: nothing is drawn; leave it out or sample")
    if batch_size is not None and batch_tokens is not None:
        raise GenerationError(f"batch_size={batch_size} beside batch_tokens={batch_tokens}; pass one of the two")
    batch_size = 16 if batch_size is None else batch_size
    check_count("batch_size", batch_size)
    if batch_tokens is not None:
        check_count("batch_tokens", batch_tokens)
    if seed is not None:
        check_count("seed", seed, 0)
    prompts = control.checked([prompts] if isinstance(prompts, str) else list(prompts), strip=strip_control)
    if is_image(images):
        images = [images]
    names = _names(images, prompts, ids)
    plan = [list(range(start, min(start + batch_size, len(prompts)))) for start in range(0, len(prompts), batch_size)]
    if batch_tokens is not None:
        plan = cut([num_beams * length for length in _lengths(processor, images, prompts, names)], batch_tokens)
    texts = [Answer("", "eos")] * len(prompts)
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for places in plan:
            given = None if images is None else [images[i] for i in places]
            batch = processor(given, [prompts[i] for i in places], ids=[names[i] for i in places])
            check_context(batch, processor, model.config)
            new = generate_ids(model, batch, settings, beam_search=beam_search)
            ended = torch.isin(new, torch.tensor(settings.eos_token_id, device=new.device)).any(dim=1).tolist()
            for place, text, whole in zip(places, processor.batch_decode(new), ended, strict=True):
                texts[place] = Answer(text, "eos" if whole else "length")
    return texts


def check_context(batch: Batch, processor: Processor, config: VLMConfig) -> None:
    """Raise `DataError` unless each sample leaves room for a token in the model's context."""
    images = (batch.input_ids == processor.image_token_id).sum(1).tolist()
    for name, total, of_images in zip(batch.ids, batch.attention_mask.sum(1).tolist(), images, strict=True):
        problem = over_context(total - of_images + 1, of_images, context_of(config))
        if problem is not None:
            raise DataError(f"sample {name!r}: {problem}")


@torch.inference_mode()
def generate_ids(
    model: VLM, batch: Batch, settings: GenerationConfig, *, beam_search: BeamSearch = "transformers"
) -> torch.Tensor:
    """Generate for one batch made without suffixes; returns int64[B, N], the new tokens only, padded after EOS.

    Args:
        settings: what `generation_config` returns, or any of transformers'.
        beam_search: the rule when `settings.num_beams` is above 1. `big_vision` reads `num_beams`, `max_new_tokens`,
            `suppress_tokens` and the ids of EOS and padding; the rest belongs to transformers' search, and is refused.

    Raises:
        GenerationError: a batch made for training or with packed samples, or settings that the rule would not read.
    """
    if batch.labels is not None:
        raise GenerationError("this batch was made for training (it has labels, padding right); make it without suffix")
    if batch.sequence_ids is not None:
        raise GenerationError("this batch has packed samples (sequence_ids); generate for samples that are not packed")
    check_beam_search(beam_search, do_sample=bool(settings.do_sample), length_penalty=settings.length_penalty)
    batch = batch.to(model.device)
    with in_eval_mode(model):
        if beam_search == "big_vision" and (settings.num_beams or 1) > 1:
            return _big_vision(model, batch, settings)
        mixin: Any = model  # transformers types `self` of generate as a class of its own
        output: torch.Tensor = mixin.generate(**batch, generation_config=settings)
    return output[:, batch.input_ids.shape[1] :]


READ_BY_BIG_VISION = {
    *("num_beams", "max_new_tokens", "suppress_tokens", "eos_token_id", "pad_token_id", "bos_token_id"),
    *("do_sample", "length_penalty", "use_cache", "transformers_version"),
}
"""Settings that the original rule reads, that have been checked before, or that change nothing."""


def _big_vision(model: VLM, batch: Batch, settings: GenerationConfig) -> torch.Tensor:
    given = settings.to_diff_dict()
    unread = [f"{name}={value}" for name, value in given.items() if name not in READ_BY_BIG_VISION]
    if unread:
        raise GenerationError(
            f"beam_search='big_vision' does not read {', '.join(unread)}; leave it out or use"
            f" beam_search='transformers'"
        )
    eos, limit = settings.eos_token_id, settings.max_new_tokens
    if not isinstance(eos, int) or limit is None:
        raise GenerationError(
            f"big_vision's beam search needs one eos_token_id and max_new_tokens, got eos_token_id={eos!r},"
            f" max_new_tokens={limit!r}; take the settings from vlm.generation.generation_config"
        )
    return big_vision_beams(
        model,
        batch,
        num_beams=int(settings.num_beams or 1),
        max_new_tokens=limit,
        eos=eos,
        pad=eos if settings.pad_token_id is None else settings.pad_token_id,
        suppress=settings.suppress_tokens or (),
    )[0]


@contextmanager
def in_eval_mode(model: VLM) -> Iterator[None]:
    """Each module's own mode comes back: model.train() would wake a frozen tower that is in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_beam_search(beam_search: str, *, do_sample: bool, length_penalty: float | None) -> None:
    """Refuse settings that the rule would ignore.

    Raises:
        GenerationError: an unknown rule; sampling or a length penalty with big_vision's.
    """
    known = get_args(BeamSearch)
    if beam_search not in known:
        raise GenerationError(
            f"unknown beam_search {beam_search!r}{nearest(str(beam_search), known)}; known: {', '.join(known)}"
        )
    if beam_search == "big_vision" and do_sample:
        raise GenerationError("beam_search='big_vision' with do_sample=True: it is a search; choose one")
    if beam_search == "big_vision" and length_penalty not in (None, 1.0):
        raise GenerationError(
            f"length_penalty={length_penalty} with beam_search='big_vision', which sums log-probabilities and never"
            f" normalises by length; leave it out or use beam_search='transformers'"
        )


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no whole number of at least `least`: "5", 2.0 and True too. Raises `GenerationError`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise GenerationError(f"{name} is {value!r}, expected a whole number")
    if value < least:
        raise GenerationError(f"{name} is {value}, expected at least {least}")


def generation_config(
    processor: Processor,
    *,
    max_new_tokens: int,
    num_beams: int,
    do_sample: bool,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    length_penalty: float = 1.0,
) -> GenerationConfig:
    """transformers' settings for the processor's tokens.

    Raises:
        GenerationError: a number is out of range, sampling and beams are asked for together, or a setting of one of
            them without it.
    """
    for name, count, least in (("max_new_tokens", max_new_tokens, 1), ("num_beams", num_beams, 1), ("top_k", top_k, 0)):
        check_count(name, count, least)
    for name, value in (("temperature", temperature), ("top_p", top_p), ("length_penalty", length_penalty)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise GenerationError(f"{name} is {value!r}, expected a number")
    if do_sample and num_beams > 1:
        raise GenerationError(f"do_sample and num_beams={num_beams} together are not supported; choose one")
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    if do_sample and not (temperature > 0 and 0 < top_p <= 1 and top_k >= 0):
        raise GenerationError(
            f"temperature {temperature} must be positive, top_p {top_p} in (0, 1] and top_k {top_k} at least 0; for no"
            f" randomness use do_sample=False"
        )
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    unread = [f"{name}={value}" for name, value in sampling.items() if value != neutral[name]]
    if unread and not do_sample:
        raise GenerationError(
            f"{', '.join(unread)} without do_sample=True: nothing is drawn; leave it out for"
            f" {'beam search' if num_beams > 1 else 'greedy decoding'}, or sample"
        )
    if length_penalty != 1.0 and num_beams == 1:
        raise GenerationError(f"length_penalty={length_penalty} without beams: only num_beams above 1 reads it")
    used = sampling if do_sample else {"length_penalty": length_penalty} if num_beams > 1 else {}
    tokenizer = processor.tokenizer
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=do_sample,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # A generated placeholder would ask for an image that is not there.
        suppress_tokens=[processor.image_token_id],
        **used,
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


def _lengths(processor: Processor, images: Sequence[Any] | None, prompts: list[str], names: list[str]) -> list[int]:
    """Tokens of each sample; of images the headers are read."""
    sizes: list[list[tuple[int, int]]] = []
    for name, given in zip(names, [[]] * len(prompts) if images is None else images, strict=True):
        try:
            several = [] if given is None else given if isinstance(given, list | tuple) else [given]
            sizes.append([image_size(image) for image in several])
        except ImageError as error:
            raise ImageError(error.code, f"sample {name!r}: {error}") from error
    return processor.lengths(sizes, prompts, ids=names)
