"""Which texts are too long for a model, found from the annotations alone: before the first step, or the first answer.

A decoder has learnt so many positions (`max_position_embeddings`), and image tokens take theirs first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.data.examples import Example
from vlm.data.problems import Problem, listing
from vlm.errors import DataError, ImageError
from vlm.images.load import ImageInput, image_size
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


def context_of(config: Any) -> int | None:
    """The positions of a model's decoder, from its `VLMConfig`; None where it does not say."""
    found = getattr(config.text_config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


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
    most_image_tokens = room.processor.max_image_tokens
    for index, example in enumerate(examples):
        texts = answers(example)
        if _surely_fits(example, texts, room, most_image_tokens):
            continue
        written: Sequence[str | None] = texts or [None]
        said = next((said for text in written if (said := _why_not(example, text, room))), None)
        if said is not None:
            found[index] = Problem(example.file, example.line, CODE, f"example {example.id!r}: {said}")
    return found


def refuse(problems: Sequence[Problem]) -> None:
    """Raise `DataError` with all of them, if there is any."""
    if problems:
        lines = listing(problems)
        head = [f"{len(problems)} examples are too long for the model:"] if len(lines) > 1 else []
        raise DataError("\n".join([*head, *lines[:1000]]))


def _surely_fits(example: Example, texts: Sequence[str], room: Room, most_image_tokens: int) -> bool:
    """Text has no more tokens than bytes, so that only long texts are tokenised."""
    prefix = len(example.prefix.encode("utf-8", "surrogatepass"))
    longest = max((len(text.encode("utf-8", "surrogatepass")) for text in texts), default=0)
    text = prefix + longest + 3  # BOS, newline, EOS
    if len(example.prefix) > MAX_CHARACTERS or longest > MAX_CHARACTERS:
        return False
    if room.max_text_length is not None and text > room.max_text_length:
        return False
    return room.context is None or text + most_image_tokens * len(example.images) <= room.context


def _why_not(example: Example, text: str | None, room: Room) -> str | None:
    """The reason, or None where it fits after all."""
    try:
        (total,) = room.processor.lengths(
            [[]],
            [example.prefix],
            None if text is None else [text],
            ids=[example.id],
            max_text_length=room.max_text_length,
        )
    except DataError as error:
        return str(error).removeprefix(f"sample {example.id!r}: ").removeprefix(f"sample {example.id!r}, ")
    return over_context(total + (text is None), image_tokens(example.images, room.processor), room.context)


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
            width, height = image_size(image) if transform.mode == "naflex" else (1, 1)
            total += processor.num_image_tokens(transform.grid(height, width))
        except ImageError:
            total += processor.max_image_tokens
    return total
