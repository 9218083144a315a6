"""What the user's own data would teach: supervised tokens, boundaries, truncation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vlm.check.report import Finding, not_applicable
from vlm.check.subject import Check, Subject
from vlm.data.examples import Example
from vlm.errors import DataError, ImageError
from vlm.model.batch import Batch
from vlm.model.loss import IGNORE

CHUNK = 64
"""Examples laid out at a time."""
WITH_IMAGE = 3
"""Examples laid out with their image too: the labels must move along with the placeholders before the text."""


@dataclass
class _Count:
    """What was counted so far."""

    supervised: list[int] = field(default_factory=list)
    tokens: int = 0
    truncated: int = 0
    wrong: list[str] = field(default_factory=list)


def labels(subject: Subject) -> Finding:
    """Every example's text as the processor lays it out, the first ones with their image too, held against the texts
    themselves."""
    if subject.data is None:
        return not_applicable("no data given: add --data FILE.jsonl (data= in Python)")
    examples = [example for example in subject.data if example.suffix is not None]
    if not examples:
        return Finding(measured=0, limit=1, relation=">=", problem="no example has a suffix: nothing is supervised")
    count = _Count()
    for start in range(0, len(examples), CHUNK):
        _add(subject, examples[start : start + CHUNK], count)
    for example in examples[:WITH_IMAGE]:
        _add_image(subject, example, count)
    total = sum(count.supervised)
    problem = f"{len(count.wrong)} wrong: {'; '.join(count.wrong[:3])}" if count.wrong else ""
    if not total and not problem:
        problem = "no token is supervised"
    detail = f"{len(examples)} examples"
    if count.supervised:
        mean = total / len(count.supervised)
        detail = (
            f"fewest supervised tokens of {len(examples)} examples (mean {mean:.1f}, most {max(count.supervised)},"
            f" {total / max(1, count.tokens):.0%} of the text), {count.truncated} cut"
        )
        if subject.max_text_length is not None:
            detail += f" at {subject.max_text_length} text tokens"
    fewest = min(count.supervised, default=0)
    return Finding(measured=fewest, limit=1, relation=">=", detail=detail, problem=problem)


def _add(subject: Subject, examples: list[Example], count: _Count) -> None:
    try:
        batch = _lay_out(subject, examples)
    except DataError as error:
        if len(examples) == 1:
            count.wrong.append(str(error))
            return
        for example in examples:  # which one is it?
            _add(subject, [example], count)
        return
    if batch.labels is None:
        count.wrong.append("the processor makes no labels")
        return
    for row, example in enumerate(examples):
        supervised = batch.labels[row] != IGNORE
        count.supervised.append(int(supervised.sum()))
        count.tokens += int(batch.attention_mask[row].sum())
        count.truncated += example.id in batch.truncated
        problem = _problem(subject, batch, row, example)
        if problem:
            count.wrong.append(f"{example.file}:{example.line}: example {example.id!r}: {problem}")


def _add_image(subject: Subject, example: Example, count: _Count) -> None:
    """Check the labels of one example behind its image; nothing is counted twice."""
    try:
        batch = _lay_out(subject, [example], [example.images])
    except (DataError, ImageError):
        return  # the text alone has been judged already, and broken images are training's business
    problem = "" if batch.labels is None else _problem(subject, batch, 0, example)
    if problem:
        count.wrong.append(f"{example.file}:{example.line}: example {example.id!r} with its image: {problem}")


def _lay_out(subject: Subject, examples: list[Example], images: list[Any] | None = None) -> Batch:
    return subject.processor(
        images,
        text=[example.prefix for example in examples],
        suffix=[example.suffix for example in examples if example.suffix is not None],
        ids=[example.id for example in examples],
        max_text_length=subject.max_text_length,
    )


def _problem(subject: Subject, batch: Batch, row: int, example: Example) -> str:
    """What is wrong with the labels of a row, or ""."""
    assert batch.labels is not None and example.suffix is not None
    tokenizer = subject.processor.tokenizer
    real = batch.attention_mask[row].bool()
    real &= (batch.input_ids[row] != subject.processor.image_token_id) | (batch.labels[row] != IGNORE)
    ids, targets, types = (values[row][real] for values in (batch.input_ids, batch.labels, batch.token_type_ids))
    supervised = targets != IGNORE
    if not supervised.any():
        return "no token is supervised"
    if not bool((targets[supervised] == ids[supervised]).all()):
        return "a label is not the token at its place (labels are shifted inside the model)"
    if not bool((supervised == (types == 1)).all()):
        return "supervised tokens and suffix (token type 1) are not the same"
    # Text to text: what is supervised must read as the suffix, the rest as the prefix.
    cut = example.id in batch.truncated
    said, asked = (_text(tokenizer, ids[where].tolist()) for where in (supervised, ~supervised))
    if not (example.suffix.startswith(said.rstrip("\ufffd")) if cut else said == example.suffix):
        return f"supervised text is {ascii(said[:60])}, the suffix {ascii(example.suffix[:60])}"
    if asked != f"{example.prefix}\n":
        return f"unsupervised text is {ascii(asked[:60])}, the prefix {ascii(example.prefix[:60])} and a newline"
    if int(ids[0]) != tokenizer.bos_token_id:
        return "the text does not begin with BOS"
    last = int(targets[supervised][-1])
    if (last == tokenizer.eos_token_id) == cut:
        return "the last supervised token is EOS after a cut" if cut else "the last supervised token is not EOS"
    return ""


def _text(tokenizer: object, ids: list[int]) -> str:
    """Ids to text, BOS and EOS dropped."""
    control = {tokenizer.bos_token_id, tokenizer.eos_token_id}  # type: ignore[attr-defined]
    kept = [index for index in ids if index not in control]
    text: str = tokenizer.decode(  # type: ignore[attr-defined]
        kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text


CHECKS = (Check("labels", "suffix and EOS are supervised, nothing else", labels, 180, runs_tower=False),)
