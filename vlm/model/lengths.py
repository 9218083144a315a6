"""Which texts are too long for a model, found from the annotations alone: before the first step, or the first answer.

A decoder has learnt so many positions (`max_position_embeddings`), and image tokens take theirs first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vlm.data.examples import Example
from vlm.data.problems import Problem, listing
from vlm.errors import DataError, ImageError
from vlm.images.load import ImageInput, image_size
from vlm.model import decoder
from vlm.model.processor import Processor
from vlm.text.tokenizer import MAX_CHARACTERS

CODE = "too-long"


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a sample may take: `context` tokens with its images (None: no bound), of which `max_text_length` text.

    `processor` lays out what is measured.
    """

    processor: Processor
    context: int | None = None
    max_text_length: int | None = None

    @cached_property
    def most_image_tokens(self) -> int:
        """Of one image; with a NaFlex tower a search over its grids."""
        return self.processor.max_image_tokens


def context_of(config: Any) -> int | None:
    """The positions of a model's decoder, from its `VLMConfig`; None where it does not say."""
    return decoder.facts(config.text_config).context


def too_long(
    examples: Sequence[Example],
    room: Room,
    answers: Callable[[Example], Sequence[str]],
) -> dict[int, Problem]:
    """Position in `examples` -> why it does not fit.

    Args:
        answers: what may follow the prompt: the suffix in training, the candidates of a choice, nothing where the model
            writes (room for one token is asked for then).
    """
    found: dict[int, Problem] = {}
    for index, example in enumerate(examples):
        texts = answers(example)
        if _surely_fits(example.prefix, texts, len(example.images), room):
            continue
        written: Sequence[str | None] = texts or [None]
        told = (_why_not(example.id, example.prefix, example.images, text, room) for text in written)
        said = next((reason for reason in told if reason), None)
        if said is not None:
            found[index] = Problem(example.file, example.line, CODE, f"example {example.id!r}: {said}")
    return found


def misfit(id: str, prompt: str, images: Sequence[ImageInput], room: Room) -> str | None:
    """Why a prompt and its images leave no room for one token of an answer, or None."""
    if _surely_fits(prompt, (), len(images), room):
        return None
    return _why_not(id, prompt, images, None, room)


def refuse(problems: Sequence[Problem]) -> None:
    """Raise `DataError` with all of them, if there is any."""
    if problems:
        lines = listing(problems)
        head = [f"{len(problems)} examples are too long for the model:"] if len(lines) > 1 else []
        raise DataError("\n".join([*head, *lines[:1000]]))


def _surely_fits(prompt: str, texts: Sequence[str], num_images: int, room: Room) -> bool:
    """Text has no more tokens than bytes, so that only long texts are tokenised."""
    prefix = len(prompt.encode("utf-8", "surrogatepass"))
    longest = max((len(text.encode("utf-8", "surrogatepass")) for text in texts), default=0)
    text = prefix + longest + 3  # BOS, newline, EOS
    if len(prompt) > MAX_CHARACTERS or longest > MAX_CHARACTERS:
        return False
    if room.max_text_length is not None and text > room.max_text_length:
        return False
    return room.context is None or text + room.most_image_tokens * num_images <= room.context


def _why_not(id: str, prompt: str, images: Sequence[ImageInput], text: str | None, room: Room) -> str | None:
    """The reason, or None where it fits after all."""
    try:
        (total,) = room.processor.lengths(
            [[]],
            [prompt],
            None if text is None else [text],
            ids=[id],
            max_text_length=room.max_text_length,
        )
    except DataError as error:
        return str(error).removeprefix(f"sample {id!r}: ").removeprefix(f"sample {id!r}, ")
    return over_context(total + (text is None), image_tokens(images, room.processor), room.context)


def over_context(text_tokens: int, image_tokens: int, context: int | None) -> str | None:
    """Why a sample does not fit into so many positions, or None."""
    total = text_tokens + image_tokens
    if context is None or total <= context:
        return None
    images = f", {image_tokens:,} of them of its images" if image_tokens else ""
    return f"{total:,} tokens{images}, the model has {context:,} positions (max_position_embeddings); shorten the text"


def image_tokens(images: Sequence[ImageInput], processor: Processor) -> int:
    """Tokens of the images of a sample, from their headers; the most there can be for one that cannot be opened."""
    transform, total = processor.image_transform, 0
    for image in images:
        try:
            width, height = image_size(image) if transform.any_aspect else (1, 1)
            total += processor.num_image_tokens(transform.grid(height, width))
        except ImageError:
            total += processor.max_image_tokens
    return total
