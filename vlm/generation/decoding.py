"""How answers are made: one set of options for `vlm.generate`, the command line, tasks, training-time scores and more.

Each option stands here once: its type, its default, its help on the command line, and what is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from typing import Any, Literal, get_args

from vlm.errors import DataError, GenerationError, nearest
from vlm.settings import option

BeamSearch = Literal["transformers", "big_vision"]
"""Whose rule of beam search: transformers' (normalised by length), or PaliGemma's own (`vlm.generation.beam`)."""
By = Literal["generate", "likelihood"]
Normalization = Literal["none", "token", "byte"]
"""What the sum of log-probabilities is divided by: nothing; the tokens of the candidate, EOS included; or its UTF-8
bytes, EOS not counted. `none` compares the answers' probabilities, and so leans to short ones; the others compare
averages, and lean to long ones whose later tokens follow from the first."""

TASK_TOKENS = 32
"""Most tokens of an answer in the tasks of `vlm.eval.tasks` and in the scores of a training run, unless they say."""

_NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""Of sampling: the values that change nothing."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are made.

    Greedy unless `num_beams` is above 1. Part of what identifies a set of predictions.

    Raises:
        GenerationError: a number is out of range or no number, sampling and beams together, or a setting that this way
            of decoding would not read (`temperature` without `do_sample`, `length_penalty` without beams).
    """

    max_new_tokens: int = option("most tokens of an answer", default=64, least=1, metavar="N")
    num_beams: int = option("beams of the search; 1, greedy, if not given", default=1, least=1, metavar="N", shown="")
    beam_search: BeamSearch = option(
        "whose rule: transformers' (normalised by length), or that of PaliGemma's published results",
        default="transformers",
        shown="",
    )
    """`big_vision`: the highest sum of log-probabilities. With one beam both are greedy."""
    length_penalty: float = option("of transformers' beams: above 1 favours long answers", default=1.0)
    do_sample: bool = option("draw tokens by their probability", default=False)
    temperature: float = option("of sampling: below 1 sharpens, above 1 flattens", default=1.0)
    top_p: float = option("of sampling: only the likeliest tokens that have this probability together", default=1.0)
    top_k: int = option("of sampling: only so many likeliest tokens; 0 for no limit", default=0)
    seed: int | None = option("of sampling: makes it repeatable", default=None)
    by: By = option(
        "write answers, or choose the likeliest of the candidates",
        default="generate",
        shown="what the task says, else generate",
    )
    normalization: Normalization = option(
        "of --by likelihood: the sum over a candidate's tokens, or divided by its tokens or bytes", default="none"
    )
    """See `vlm.generation.likelihood`."""

    def __post_init__(self) -> None:
        _check_numbers(self)
        check_choice("beam_search", self.beam_search, get_args(BeamSearch))
        check_choice("by", self.by, get_args(By))
        check_choice("normalization", self.normalization, get_args(Normalization))
        _check_sampling(self)
        check_rule(self.beam_search, do_sample=self.do_sample, length_penalty=self.length_penalty)
        if self.length_penalty != 1.0 and self.num_beams == 1:
            raise GenerationError(
                f"length_penalty={self.length_penalty} without beams: only num_beams above 1 reads it"
            )

    def to_dict(self) -> dict[str, Any]:
        """What counts for this way of answering."""
        if self.by == "likelihood":
            return {"by": self.by, "normalization": self.normalization}
        values = {name: value for name, value in asdict(self).items() if name in _ALWAYS or value != _DEFAULTS[name]}
        if self.num_beams == 1:
            values.pop("beam_search", None)  # greedy has no beams
        return {name: value for name, value in values.items() if name not in ("by", "normalization")}

    def check_repeatable(self) -> None:
        """Raise `GenerationError` for sampling: what is scored is decoded so that it gives the same answer twice."""
        if self.do_sample:
            raise GenerationError("do_sample=True: answers that are scored are not drawn; use greedy decoding or beams")


_ALWAYS = ("max_new_tokens", "num_beams", "beam_search")
_DEFAULTS: dict[str, Any] = {one.name: one.default for one in fields(Decoding)}


def choose(candidates: Sequence[Sequence[str]], scores: Sequence[Sequence[float]]) -> list[str]:
    """The likeliest candidate of each item; of equally likely ones the first.

    Raises:
        DataError: scores that do not belong to these candidates, or that are not a number.
    """
    if len(candidates) != len(scores):
        raise DataError(f"scores of {len(scores)} items for candidates of {len(candidates)}")
    chosen = []
    for index, (texts, values) in enumerate(zip(candidates, scores, strict=True)):
        if not texts or len(texts) != len(values):
            raise DataError(f"item {index}: {len(values)} scores for {len(texts)} candidates")
        if any(value != value for value in values):
            raise DataError(f"item {index}: a score is NaN; does the model overflow? Use bfloat16 or float32")
        chosen.append(texts[values.index(max(values))])
    return chosen


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no whole number of at least `least`: "5", 2.0 and True too. Raises `GenerationError`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise GenerationError(f"{name} is {value!r}, expected a whole number")
    if value < least:
        raise GenerationError(f"{name} is {value}, expected at least {least}")


def check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raise `GenerationError` unless `value` is one of the known words."""
    if value not in known:
        raise GenerationError(f"unknown {name} {value!r}{nearest(str(value), known)}; known: {', '.join(known)}")


def check_rule(beam_search: str, *, do_sample: bool, length_penalty: float | None) -> None:
    """Refuse settings that a rule of beams would ignore.

    Raises:
        GenerationError: an unknown rule; sampling or a length penalty with big_vision's.
    """
    check_choice("beam_search", beam_search, get_args(BeamSearch))
    if beam_search == "big_vision" and do_sample:
        raise GenerationError("beam_search='big_vision' with do_sample=True: it is a search; choose one")
    if beam_search == "big_vision" and length_penalty not in (None, 1.0):
        raise GenerationError(
            f"length_penalty={length_penalty} with beam_search='big_vision', which sums log-probabilities and never"
            f" normalises by length; leave it out or use beam_search='transformers'"
        )


def _check_numbers(decoding: Decoding) -> None:
    for name, least in (("max_new_tokens", 1), ("num_beams", 1), ("top_k", 0)):
        check_count(name, getattr(decoding, name), least)
    for name in ("temperature", "top_p", "length_penalty"):
        value = getattr(decoding, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise GenerationError(f"{name} is {value!r}, expected a number")


def _check_sampling(decoding: Decoding) -> None:
    do_sample, num_beams, seed = decoding.do_sample, decoding.num_beams, decoding.seed
    if do_sample and num_beams > 1:
        raise GenerationError(f"do_sample and num_beams={num_beams} together are not supported; choose one")
    temperature, top_p, top_k = decoding.temperature, decoding.top_p, decoding.top_k
    if do_sample and not (temperature > 0 and 0 < top_p <= 1 and top_k >= 0):
        raise GenerationError(
            f"temperature {temperature} must be positive, top_p {top_p} in (0, 1] and top_k {top_k} at least 0; for no"
            f" randomness use do_sample=False"
        )
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    unread = [f"{name}={value}" for name, value in sampling.items() if value != _NEUTRAL[name]]
    if unread and not do_sample:
        raise GenerationError(
            f"{', '.join(unread)} without do_sample=True: nothing is drawn; leave it out for"
            f" {'beam search' if num_beams > 1 else 'greedy decoding'}, or sample"
        )
    if seed is not None and not do_sample:
        raise GenerationError(f"seed={seed} without do_sample=True: nothing is drawn; leave it out or sample")
    if seed is not None:
        check_count("seed", seed, 0)
