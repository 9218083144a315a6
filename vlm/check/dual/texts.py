"""Texts on their way in: case, length, the side of the padding, and that no mask hides it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm.check.dual_subject import TEXTS, DualSubject, distance
from vlm.check.report import Finding, not_applicable
from vlm.check.subject import CONTROL, Check
from vlm.errors import ConfigError

SPELLINGS = ("A RED SQUARE LEFT OF A BLUE CIRCLE", "Two Dogs", "A photo of a small CAT", "ÉTÉ À LA PLAGE")
SHORT = ("two dogs", "red", "snow")
LONG = " ".join(["word"] * 500)
"""Longer than any context."""


def case(subject: DualSubject) -> Finding:
    """Texts in capitals and in small letters, through the processor: equal ids."""
    rule = subject.processor.rule
    if rule.case != "lower":
        return not_applicable(f"{rule.title} keeps case ({rule.case}): capitals are other texts to it")
    as_written, lower = subject.ids(SPELLINGS), subject.ids([text.lower() for text in SPELLINGS])
    wrong = int((as_written != lower).any(1).sum())
    problem = ""
    if wrong:
        moved = distance(subject.text(as_written), subject.text(lower))
        problem = f"capitals reach the text tower, which never saw one: embeddings move by up to {moved:.1e}"
    detail = f"of {len(SPELLINGS)} texts with capitals, those whose ids are not those of small letters"
    return Finding(measured=wrong, limit=0, detail=detail, problem=problem)


def length(subject: DualSubject) -> Finding:
    """Every row of ids against the text tower's table of positions; and what padding to the longest would do."""
    table = positions(subject.model)
    rows = {subject.ids(texts).shape[1] for texts in (TEXTS, TEXTS[1:2], ("",), (LONG,))}
    missed = max(abs(number - table) for number in rows)
    found = f"rows have {', '.join(map(str, sorted(rows)))} ids, the text tower {table} positions"
    if missed:
        return Finding(measured=missed, limit=0, detail=found, problem="pad and cut each text to the whole context")
    alone = subject.ids(TEXTS[1:2])
    short = alone[:, : int(_real(alone).sum())]
    if short.shape[1] == table:
        return Finding(measured=0, limit=0, detail=found)
    try:
        moved = distance(subject.text(alone), subject.text(short))
    except ConfigError:
        return Finding(measured=0, limit=0, detail=f"{found}; the model refuses any other number")
    if subject.processor.rule.attention == "causal":
        # A later position never reaches an earlier one: there the length is a matter of batches alone.
        detail = f"{found}; padded to the text alone, its embedding moves by {moved:.1e}"
        return Finding(measured=moved, limit=subject.rounding, detail=detail)
    return Finding(measured=0, limit=0, detail=f"{found}; padded to the text alone, its embedding moves {moved:.1e}")


def side(subject: DualSubject) -> Finding:
    """Where the tokens of a text stand in its row: at its beginning, and the end token last where it is cut."""
    processor = subject.processor
    ids, first = subject.ids([*TEXTS, LONG]), int(processor.rule.bos is not None)
    wrong = []
    for text, row in zip((*TEXTS, LONG), ids.tolist(), strict=True):
        tokens = processor.tokenizer(processor.rule.clean(text), add_special_tokens=False)["input_ids"]
        room = len(row) - first - 1
        if row[first : first + min(len(tokens), room)] != tokens[:room]:
            wrong.append(f"{text[:20]!r} does not begin at position {first}")
    end = processor.tokenizer.eos_token_id
    if end is not None and int(ids[-1, -1]) != end:
        wrong.append(f"a text that is cut ends in {int(ids[-1, -1])}, not in the end token {end}")
    pad = int(ids[1, -1])
    moved = distance(subject.text(ids), subject.text(_left(ids, pad)))
    detail = f"of {len(ids)} texts, those that do not begin their row; padded on the left they move {moved:.1e}"
    return Finding(measured=len(wrong), limit=0, detail=detail, problem="; ".join(wrong[:2]))


def mask(subject: DualSubject) -> Finding:
    """Noise on the embedded padding: it must move an embedding of a tower that was trained without a mask, and must not
    move one that reads its first end token and looks back only."""
    ids = subject.ids(SHORT)
    under = ~_real(ids)
    under[:, -1] = False  # the position that is read
    if not bool(under.any(1).all()):
        return not_applicable(f"the context of {ids.shape[1]} ids leaves no room for padding after {SHORT[0]!r}")
    word = torch.zeros_like(under)
    word[:, int(subject.processor.rule.bos is not None)] = True
    before = subject.text(ids)
    hidden, seen = ((before - _noisy(subject, ids, where)).norm(dim=-1) for where in (under, word))
    shown = f"(on a word: {float(seen.min()):.1e})"
    if subject.processor.rule.attention == "causal":
        blind = float(seen.min()) < CONTROL * subject.nothing
        problem = "the words of a text do not reach its embedding: it reads another position" if blind else ""
        detail = f"noise after the end token moves an embedding {shown}"
        return Finding(measured=float(hidden.max()), limit=subject.nothing, detail=detail, problem=problem)
    least = float(hidden.min())
    problem = "" if least >= subject.sees else "the padding is masked; this tower was trained without an attention mask"
    detail = f"least that noise on the padding moves an embedding {shown}"
    return Finding(measured=least, limit=subject.sees, relation=">=", detail=detail, problem=problem)


def _noisy(subject: DualSubject, ids: Tensor, where: Tensor) -> Tensor:
    """float32[N, D]: embeddings of texts with noise on their embedded tokens at bool[N, L]. The ids stay as they are: a
    mask that is made from them would open."""
    tables = [one for name, one in subject.model.named_modules() if name.endswith("token_embedding")]
    noise = torch.randn((*where.shape, 1), generator=torch.Generator().manual_seed(0)).to(where.device)

    def add(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        own = noise * output.std() * torch.linspace(-2, 2, output.shape[-1], device=output.device)
        return torch.where(where[..., None], output + own.to(output.dtype), output)

    hooks = [table.register_forward_hook(add) for table in tables]
    try:
        return subject.text(ids)
    finally:
        for hook in hooks:
            hook.remove()


def positions(model: torch.nn.Module) -> int:
    """Rows of the text tower's table of positions, read from the weights."""
    for name, weight in model.named_parameters():
        inside_text = not any(part in name for part in ("visual", "vision"))
        if inside_text and name.endswith(("position_embedding.weight", "positional_embedding")):
            return len(weight)
    raise RuntimeError("the text tower has no table of positions")


def _real(ids: Tensor) -> Tensor:
    """bool[N, L]: the text and its first end token; what follows is padding, as in the row's last place."""
    pad = ids[:, -1:]
    count = torch.arange(ids.shape[1], device=ids.device)
    last = torch.where(ids != pad, count, -1).amax(1)
    return count <= last[:, None] + 1


def _left(ids: Tensor, pad: int) -> Tensor:
    """The same rows with their padding on the left."""
    rows = []
    for row in ids:
        real = int((row != pad).nonzero().max()) + 1
        rows.append(row.roll(len(row) - real))
    return torch.stack(rows)


CHECKS = (
    Check("text-case", "a text reaches the text tower in the case that it was trained with", case, 10),
    Check("text-length", "every text has as many ids as the text tower has positions", length, 20),
    Check("text-side", "padding stands after the text", side, 30),
    Check("text-mask", "padding is seen as in training: no attention mask", mask, 40),
)
