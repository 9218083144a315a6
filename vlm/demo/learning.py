"""What the pretraining of tower and decoder have in common: words, the training loop, the files."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vlm.demo import captions, questions, scenes
from vlm.files import publishing, write_json
from vlm.text import tokenizer as tokenizers

log = logging.getLogger("vlm")

CAPTION_PREFIX = "caption en"
ANSWER_PREFIX = "answer en {}"
PIECES = 500
"""Upper bound of the tokenizer's own pieces: 256 bytes, Gemma's special pieces, and every word of the demo as one."""
MOST_THINGS = 4
"""In a picture of the pretraining: more than the demo shows."""
WARMUP = 150
WEIGHTS = "model.safetensors"


def make_tokenizer() -> tokenizers.Tokenizer:
    """A Gemma tokenizer in which every word of the demo is one piece. Always the same."""
    rng = random.Random("tokenizer")
    corpus: list[str] = []
    for _ in range(4000):
        scene = scenes.make_scene(rng, most=MOST_THINGS)
        corpus += [CAPTION_PREFIX, *captions.captions(rng, scene)]
        for question in questions.ask(rng, scene, len(questions.KINDS), tuple(questions.KINDS)):
            corpus += [ANSWER_PREFIX.format(question.text), question.answer]
    return tokenizers.build(corpus, vocab_size=PIECES)


class Words:
    """Text to ids, each text tokenised once."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds the tokenizer."""
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]


def pad(rows: list[list[int]], length: int = 0) -> Tensor:
    """int64[B, S] with 0 (the pad id) after each row; S is at least `length`."""
    length = max(length, *map(len, rows))
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def fit(
    name: str,
    parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
    batches: Iterator[Any],
    loss_of: Callable[[Any], Tensor],
    steps: int,
    rate: float,
    weight_decay: float,
) -> None:
    """AdamW on one thread; the rate rises for WARMUP steps, a quarter of all at most, and falls to zero in a straight
    line.

    Args:
        parameters: a list of them, or groups with "params" and, if their rate is another one, how many "times" it is.
    """
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
    every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    warmup = min(WARMUP, max(1, steps // 4))
    started = time.monotonic()
    for step, batch in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / warmup) * (1 - (step - 1) / steps) * group.get("times", 1)
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(every, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps:
            log.info("%s: step %d of %d, loss %.3f, %.0f s", name, step, steps, loss.item(), time.monotonic() - started)


def save(model: Any, folder: Path, files: dict[str, Any] | None = None, weights: str = WEIGHTS) -> None:
    """Put a checkpoint into the folder in one step, beside what is there."""
    with publishing(folder, keep=lambda name: True) as finished:
        model.half().save_pretrained(finished)
        for name, content in (files or {}).items():
            write_json(finished / name, content)
        (finished / WEIGHTS).rename(finished / weights)


def complete(folder: Path, file: str) -> bool:
    """Whether a checkpoint with this file is there and can be read; if it is damaged, that is told."""
    if not (folder / file).exists():
        return False
    try:
        for path in folder.glob("*.json"):
            json.loads(path.read_text(encoding="utf-8"))
        if file.endswith(".safetensors"):
            with safe_open(folder / file, framework="pt"):
                pass
    except (ValueError, SafetensorError) as error:
        log.warning("%s is damaged (%s): it is made again", folder, error)
        return False
    return True
