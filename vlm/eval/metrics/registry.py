"""Metrics by exact name, and the checks that all of them share.

    from vlm.eval import metrics
    result = metrics.compute("cider", {"1": "a red cat"}, {"1": ("a red cat", "the cat is red")})

A metric is one function `(predictions, references) -> MetricResult`. It never sees a model or an image. One that must
know more of an item than its gold texts (the choices, the size of the image, the split) registers with `needs` or
`uses` and is then called as `(predictions, references, info)`:

    info = {"1": {"choices": ["cat", "dog"]}}
    metrics.compute("multiple_choice", {"1": "B"}, {"1": ("dog",)}, info)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from vlm.errors import ConfigError, DataError, nearest
from vlm.eval.metrics.result import Constant, MetricResult, no_intervals
from vlm.words import listed

Predictions = Mapping[str, str]
References = Mapping[str, tuple[str, ...]]
Info = Mapping[str, Mapping[str, Any]]
"""Item id -> further facts of the item, such as `choices`, `split`, `question_type`."""
MetricFunction = Callable[[Predictions, References], MetricResult]
InformedFunction = Callable[[Predictions, References, Info], MetricResult]
Constants = Callable[[References, Info], list[str]]

_TRIED = 10
_SAMPLE = 2000


@dataclass(frozen=True)
class Metric:
    """A registered metric."""

    name: str
    function: MetricFunction | InformedFunction
    summary: str
    """One line for a list of metrics."""
    reads: Literal["references", "answers"]
    """The field of an example that holds its gold texts: free texts, or the answers that people gave to a question."""
    per_item_is_right: bool
    """Whether a per-item score of 1 means right and 0 wrong, so that a gallery may say so."""
    needs: tuple[str, ...] = ()
    """Facts that `info` must hold of every item."""
    uses: tuple[str, ...] = ()
    """Facts that add details where `info` holds them, of every item or of none."""
    constants: Constants | None = None
    """The answers among which `best_constant` looks; None where an answer that is the same for all says nothing."""

    @property
    def informed(self) -> bool:
        """Whether the function is called with `info`."""
        return bool(self.needs or self.uses)


_Function = TypeVar("_Function", bound=MetricFunction | InformedFunction)
_METRICS: dict[str, Metric] = {}
_LEFT_OUT = {
    "spice": "spice is left out: its Java program needs parser models of 2015 that pycocoevalcap no longer ships; "
    "meteor, cider, rouge_l and bleu are there",
}
_GROUPS: dict[str, tuple[str, ...]] = {"bleu": ("bleu_1", "bleu_2", "bleu_3", "bleu_4")}


def register(
    name: str,
    *,
    summary: str,
    reads: Literal["references", "answers"],
    per_item_is_right: bool = False,
    needs: Sequence[str] = (),
    uses: Sequence[str] = (),
    constants: Constants | None = None,
) -> Callable[[_Function], _Function]:
    """Decorator: make a function known under `name`. A name that is taken raises ValueError.

    `constants` are the answers that could be right for many items at once; by default the commonest gold texts, where
    the items' scores say right or wrong or the gold texts are people's answers.

    With `needs` or `uses` the function is called as `(predictions, references, info)`, where `info` has an entry for
    every item.
    """

    if name in _METRICS or name in _GROUPS:
        raise ValueError(f"a metric called {name!r} exists already; choose another name")

    def decorate(function: _Function) -> _Function:
        tried = commonest if constants is None and (per_item_is_right or reads == "answers") else constants
        _METRICS[name] = Metric(name, function, summary, reads, per_item_is_right, tuple(needs), tuple(uses), tried)
        return function

    return decorate


def names() -> list[str]:
    """Every name that `compute` knows, sorted."""
    return sorted(_METRICS)


def get(name: str) -> Metric:
    """The metric with exactly this name, else ConfigError that lists the known ones and the nearest."""
    if name in _METRICS:
        return _METRICS[name]
    if name in _LEFT_OUT:
        raise ConfigError(_LEFT_OUT[name])
    known = sorted([*_METRICS, *_GROUPS])
    raise ConfigError(f"unknown metric {name!r}{nearest(name, known)}; known: {', '.join(known)}")


def expand(requested: Sequence[str] | str) -> list[Metric]:
    """Names (a list, or one comma-separated string) to metrics: groups such as `bleu` are spelled out, repeats dropped.

    Raises:
        ConfigError: an unknown name, or no name at all.
    """
    asked = requested.split(",") if isinstance(requested, str) else list(requested)
    flat = [member for name in asked if name.strip() for member in _GROUPS.get(name.strip(), (name.strip(),))]
    if not flat:
        raise ConfigError(f"no metric was named; known: {', '.join(sorted([*_METRICS, *_GROUPS]))}")
    return [get(name) for name in dict.fromkeys(flat)]


def compute(name: str, predictions: Predictions, references: References, info: Info | None = None) -> MetricResult:
    """Score `predictions` (id -> text) against `references` (id -> gold texts) with the metric called `name`.

    Every reference needs a prediction (an empty text counts as wrong) and every prediction a reference: the denominator
    is always the number of references.

    Args:
        name: one of `names()`.
        predictions: id -> what the model said.
        references: id -> gold texts.
        info: id -> further facts. What no metric asks for is left alone; only `Metric.needs` is required.

    Raises:
        ConfigError: unknown metric.
        DataError: the ids differ, an item has no reference, a text is not a string, a fact that the metric needs is
            missing, or the metric refuses the data.
    """
    metric = get(name)
    check_pairs(predictions, references)
    if not metric.informed:
        return cast(MetricFunction, metric.function)(predictions, references)
    facts = {key: (info or {}).get(key, {}) for key in references}
    _check_facts(metric, facts)
    return cast(InformedFunction, metric.function)(predictions, references, facts)


def commonest(references: References, info: Info) -> list[str]:
    """The gold texts that most items have, at most ten; the first of equals first."""
    counts = Counter(text for texts in references.values() for text in dict.fromkeys(texts))
    return [text for text, _ in counts.most_common(_TRIED)]


def best_constant(
    metric: Metric, references: References, info: Info | None = None, value: Callable[[str], float] | None = None
) -> Constant | None:
    """The best answer among those that are the same for every item, scored by the metric itself.

    What a model is worth that has not looked: of yes-or-no questions of which 55 % are yes, "yes" gets 0.55.

    Args:
        value: the value of one answer over all items, where it is not the metric's own (a mean over groups of items).

    Returns:
        None where the metric has no such answers.
    """
    if metric.constants is None:
        return None
    facts = {key: (info or {}).get(key, {}) for key in references}

    def alone(answer: str, keys: Sequence[str]) -> float:
        gold = {key: references[key] for key in keys}
        return compute(metric.name, dict.fromkeys(keys, answer), gold, {key: facts[key] for key in keys}).value

    keys = list(references)
    candidates = metric.constants(references, facts)
    with no_intervals():
        if len(keys) > _SAMPLE:  # chosen on a part of them; the value is of all
            part = keys[:: -(-len(keys) // _SAMPLE)]
            candidates = sorted(candidates, key=lambda answer: -alone(answer, part))[:1]
        values = {answer: value(answer) if value else alone(answer, keys) for answer in candidates}
    if not values:
        return None
    best = max(values, key=lambda answer: values[answer])
    return Constant(best, values[best])


def _check_facts(metric: Metric, facts: Info) -> None:
    """Raise DataError unless every item has what `metric` needs, and all items or none what it uses."""
    for fact in (*metric.needs, *metric.uses):
        lacking = [key for key, known in facts.items() if known.get(fact) is None]
        if not lacking or (fact in metric.uses and len(lacking) == len(facts)):
            continue
        have = "; give it to all items or to none" if fact in metric.uses else f"; {metric.name} cannot do without it"
        raise DataError(f"{len(lacking)} of {len(facts)} items have no {fact!r}{_sample(lacking)}{have}")


def check_pairs(predictions: Predictions, references: References) -> None:
    """Raise DataError unless both sides hold the same ids, every item has a reference and every text is a str."""
    if not references:
        raise DataError("nothing to score: there are no references")
    missing = [key for key in references if key not in predictions]
    extra = [key for key in predictions if key not in references]
    if missing or extra:
        parts = [f"{len(missing)} without a prediction{_sample(missing)}"] if missing else []
        parts += [f"{len(extra)} predictions without references{_sample(extra)}"] if extra else []
        raise DataError(
            f"predictions and references must hold the same ids; got {'; '.join(parts)}. An item without an answer is"
            " scored as wrong when its prediction is the empty text; leaving it out would change the denominator"
        )
    empty = [key for key, texts in references.items() if not texts]
    if empty:
        raise DataError(f"{len(empty)} of {len(references)} items have no reference text{_sample(empty)}")
    for key, texts in references.items():
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"references of item {key!r} must be a tuple of texts, got {texts!r}")
        if not isinstance(predictions[key], str):
            raise DataError(f"prediction of item {key!r} must be a text, got {predictions[key]!r}")


def refuse_few_answers(name: str, references: References, at_least: int) -> None:
    """Raise DataError for questions with fewer than `at_least` answers, which no prediction could get fully right."""
    few = [key for key, answers in references.items() if len(answers) < at_least]
    if few:
        raise DataError(
            f"{name} counts how many people gave an answer, so each question needs at least {at_least} answers (the"
            f" official sets have 10); {len(few)} of {len(references)} questions have fewer, first {few[0]!r} with"
            f" {len(references[few[0]])}. Use exact_match for a single gold answer"
        )


def only_reference(name: str, key: str, references: References) -> str:
    """The gold text of an item that must have exactly one. Raises DataError."""
    texts = references[key]
    if len(set(texts)) != 1:
        raise DataError(f"{name} compares with one gold text; item {key!r} has {len(texts)}: {', '.join(texts[:5])}")
    return texts[0]


def _sample(ids: list[str]) -> str:
    return f": {listed(ids, show=repr)}"
