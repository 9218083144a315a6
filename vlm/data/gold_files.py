"""Annotation files of the benchmarks, read strictly: what predictions are compared with. The keys tell the format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlm.data.rows import MAX_LISTED, Document, Row, listed, once, open_document, text, texts, without_extension
from vlm.errors import ConfigError, DataError, nearest

Pairs = Iterator[tuple[str, "Gold"]]


@dataclass(frozen=True)
class Gold:
    """What is known of one item."""

    references: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    left_out: str = ""
    """Why the official script does not score the item; empty for an item that it scores."""
    left_out_of: Literal["all", "answers"] = "all"
    """Whether that holds for every metric, or for those that read `answers`."""

    def texts(self, reads: Literal["references", "answers"]) -> tuple[str, ...]:
        """The gold texts for a metric that reads this field; the other field where it is empty."""
        first, second = self.references, self.answers
        return (second or first) if reads == "answers" else (first or second)

    def scored(self, reads: Literal["references", "answers"]) -> bool:
        return not self.left_out or self.left_out_of not in ("all", reads)


@dataclass(frozen=True)
class Format:
    """How the annotations of one benchmark look."""

    about: str
    matches: Callable[[Document], bool]
    read: Callable[[Document], Pairs]


def read_gold(path: str | Path, format: str | None = None) -> tuple[dict[str, Gold], str]:
    """Gold by id, and the name of the format, told from the content unless `format` is one of `FORMATS`.

    Raises:
        ConfigError: unknown format.
        DataError: the file cannot be read as such, an id occurs twice (listed), or an item has no gold text (listed).
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}{nearest(format, FORMATS)}; known: {', '.join(FORMATS)}")
    document = open_document(path)
    found = format or next((name for name, known in FORMATS.items() if known.matches(document)), None)
    if found is None:
        raise DataError(
            f"{document.name}: references of no known format; the keys are "
            f"{', '.join(sorted(document.keys)[:MAX_LISTED])}. Known: "
            f"{'; '.join(f'{name}: {known.about}' for name, known in FORMATS.items())}"
        )
    gold = once(FORMATS[found].read(document), document.name)
    bare = [key for key, item in gold.items() if not item.references and not item.answers]
    if bare:
        raise DataError(f"{document.name}: {len(bare)} items have no gold text: {listed(bare)}")
    return gold, found


def check_questions(path: str | Path, gold: Mapping[str, Gold]) -> None:
    """Raise DataError unless a VQA questions file asks exactly the questions that are annotated."""
    document = open_document(path)
    if document.object is None:
        raise DataError(f"{document.name}: a list; a questions file is an object with 'questions'")
    asked = once(((question.id("question_id"), None) for question in document.object.rows("questions")), document.name)
    for ids, others, what in ((asked, gold, "questions without annotation"), (gold, asked, "annotations without one")):
        alone = [key for key in ids if key not in others]
        if alone:
            raise DataError(f"{document.name}: {len(alone)} {what}: {listed(alone)}")


# --- Readers ----------------------------------------------------------------------------------------------------------


def _whole(document: Document) -> Row:
    if document.object is None:
        raise DataError(f"{document.name}: a list or JSONL; this format is one object")
    return document.object


def _records(document: Document) -> list[Row]:
    """The records; a single JSONL line is one too."""
    return document.records or [_whole(document)]


def _join(value: Any, where: str) -> str:
    """A kind that may be a list of kinds, as one text: ["form", "layout"] -> "form, layout"."""
    return ", ".join(sorted(texts(value, where))) if isinstance(value, list) and value else str(value or "none")


def _facts(source: Row, *names: str) -> dict[str, Any]:
    return {name: _join(source.values[name], source.where) for name in names if source.values.get(name) is not None}


def _coco(document: Document) -> Pairs:
    whole = _whole(document)
    strict = "images" in whole.values
    images = whole.rows("images") if strict else []
    captions: dict[str, list[str]] = once(((image.id("id"), []) for image in images), whole.where) if strict else {}
    for annotation in whole.rows("annotations"):
        key = annotation.id("image_id")
        if strict and key not in captions:
            raise DataError(f"{annotation.where}: image {key!r} is not among the images of the file")
        captions.setdefault(key, []).append(annotation.text("caption"))
    for key, found in captions.items():
        yield key, Gold(references=tuple(found))


def _vqa(document: Document) -> Pairs:
    for row in _whole(document).rows("annotations"):
        answers = tuple(answer.text("answer") for answer in row.rows("answers"))
        yield row.id("question_id"), Gold(answers=answers, info=_facts(row, "question_type", "answer_type"))


def _data(id_key: str) -> Callable[[Document], Pairs]:
    """TextVQA, ST-VQA (`question_id`) and DocVQA, InfographicVQA (`questionId`): {"data": [{id, answers}]}."""

    def read(document: Document) -> Pairs:
        for row in _whole(document).rows("data"):
            info = _facts(row, "question_type", "answer_type")
            if "question_types" in row.values:
                info["question_type"] = _join(row.values["question_types"], row.where)
            yield row.id(id_key), Gold(answers=row.texts("answers"), info=info)

    return read


def _gqa(document: Document) -> Pairs:
    whole = _whole(document)
    for key in whole.values:
        question = whole.row(key)
        info = _facts(question.row("types"), "structural", "semantic") if "types" in question.values else {}
        balanced = question.values.get("isBalanced", True)
        reason = "" if balanced else "not in GQA's balanced set"
        yield key, Gold(references=(question.text("answer"),), info=info, left_out=reason)


def _pope(document: Document) -> Pairs:
    for row in _records(document):
        split = row.values.get("split", row.values.get("category"))
        info = {"label": row.one_of("label", "yes", "no")}
        if split is not None:
            info["split"] = text(split, f"{row.where}: the split")
        yield row.id("question_id"), Gold(references=(info["label"],), info=info)


def _science_qa(document: Document) -> Pairs:
    whole = _whole(document)
    for key in whole.values:
        problem = whole.row(key)
        choices = problem.texts("choices")
        index = problem.index("answer", len(choices))
        info = {"choices": list(choices), "answer_index": index, **_facts(problem, "subject", "grade", "split")}
        yield key, Gold(references=(choices[index],), info=info)


def _aokvqa(document: Document) -> Pairs:
    for row in _records(document):
        choices = row.texts("choices")
        right = row.index("correct_choice_idx", len(choices))
        difficult = row.flag("difficult_direct_answer") if "difficult_direct_answer" in row.values else False
        yield (
            row.id("question_id"),
            Gold(
                references=(choices[right],),
                answers=row.texts("direct_answers"),
                info={"choices": list(choices), "answer_index": right},
                left_out="marked difficult_direct_answer" if difficult else "",
                left_out_of="answers",
            ),
        )


def _vizwiz(document: Document) -> Pairs:
    for row in _records(document):
        info: dict[str, Any] = _facts(row, "answer_type")
        if "answerable" in row.values:
            info["answerable"] = row.flag("answerable")
        answers = tuple(answer.text("answer") for answer in row.rows("answers"))
        yield without_extension(row.text("image")), Gold(answers=answers, info=info)


def _tallyqa(document: Document) -> Pairs:
    for row in _records(document):
        answer = row.values.get("answer")
        gold = str(answer) if type(answer) is int else row.text("answer")
        info = {"split": "simple" if row.flag("issimple") else "complex"}
        yield f"{row.id('image_id')}-{row.id('question_id')}", Gold(references=(gold,), info=info)


def _nlvr2(document: Document) -> Pairs:
    for row in _records(document):
        label = row.one_of("label", "True", "False")
        yield row.id("identifier"), Gold(references=(label,), info={"label": label})


def _jsonl(document: Document) -> Pairs:
    """Our own annotations, and `items.jsonl` of `vlm eval`: further keys, and those of `info`, are facts.

    Without `id` the line number is the id, as everywhere in this package.
    """
    known = {"id", "references", "answers", "suffix", "info", "prediction", "prefix", "image", "scores"}
    for row in _records(document):
        suffix = (row.text("suffix"),) if row.values.get("suffix") is not None else ()
        references = row.texts("references") if row.values.get("references") is not None else ()
        answers = row.texts("answers") if row.values.get("answers") is not None else ()
        info = {key: value for key, value in row.values.items() if key not in known}
        if row.values.get("info") is not None:
            info |= row.row("info").values
        key = str(row.line) if row.line and "id" not in row.values else row.id("id")
        yield key, Gold(references or (() if answers else suffix), answers, info)


def _mapping(document: Document) -> Pairs:
    for key, value in _whole(document).values.items():
        where = f"{document.name}: {key!r}"
        yield key, Gold(references=(text(value, where),) if isinstance(value, str) else texts(value, where))


# --- Formats ----------------------------------------------------------------------------------------------------------


def _inside(key: str, *keys: str) -> Callable[[Document], bool]:
    """The object's list `key` holds objects with these keys."""

    def matches(document: Document) -> bool:
        found = document.object.values.get(key) if document.object is not None else None
        first = found[0] if isinstance(found, list) and found else None
        return isinstance(first, dict) and set(keys) <= set(first)

    return matches


def _each(*keys: str) -> Callable[[Document], bool]:
    """The first record has these keys (a single JSONL line is one), and not `id`, which only our own lines have."""
    return lambda document: document.keys.issuperset(keys) and "id" not in document.keys


def _is_jsonl(document: Document) -> bool:
    return "id" in document.keys or (
        "prefix" in document.keys and bool({"suffix", "answers", "references"} & document.keys)
    )


def _by_id(*keys: str) -> Callable[[Document], bool]:
    """An object by id whose first value has these keys."""

    def matches(document: Document) -> bool:
        first = document.first if document.object is not None else None
        return first is not None and set(keys) <= set(first.values)

    return matches


def _is_mapping(document: Document) -> bool:
    return document.object is not None and all(isinstance(v, str | list) for v in document.object.values.values())


# Tried in this order.
FORMATS = {
    "coco": Format(
        'COCO captions: {"images", "annotations": [{"image_id", "caption"}]}',
        _inside("annotations", "image_id", "caption"),
        _coco,
    ),
    "vqa": Format(
        'VQA v2, OK-VQA: {"annotations": [{"question_id", "answers": [{"answer"}]}]}',
        _inside("annotations", "question_id", "answers"),
        _vqa,
    ),
    "textvqa": Format(
        'TextVQA, ST-VQA: {"data": [{"question_id", "answers"}]}',
        _inside("data", "question_id", "answers"),
        _data("question_id"),
    ),
    "rrc": Format(
        'DocVQA, InfographicVQA: {"data": [{"questionId", "answers"}]}',
        _inside("data", "questionId", "answers"),
        _data("questionId"),
    ),
    "aokvqa": Format(
        'A-OKVQA: list of {"question_id", "choices", "correct_choice_idx", "direct_answers"}',
        _each("question_id", "choices", "correct_choice_idx", "direct_answers"),
        _aokvqa,
    ),
    "vizwiz": Format(
        'VizWiz: list of {"image", "question", "answers": [{"answer"}]}', _each("image", "question", "answers"), _vizwiz
    ),
    "tallyqa": Format(
        'TallyQA: list of {"image_id", "question_id", "answer", "issimple"}; the id is image_id-question_id',
        _each("question_id", "answer", "issimple"),
        _tallyqa,
    ),
    "nlvr2": Format(
        'NLVR2: JSONL of {"identifier", "sentence", "label"}', _each("identifier", "sentence", "label"), _nlvr2
    ),
    "pope": Format('POPE: JSONL of {"question_id", "text", "label"}', _each("question_id", "label"), _pope),
    "scienceqa": Format(
        'ScienceQA problems.json: {id: {"choices", "answer"}}', _by_id("choices", "answer"), _science_qa
    ),
    "gqa": Format('GQA questions: {id: {"question", "answer"}}', _by_id("question", "answer"), _gqa),
    "jsonl": Format('JSONL or list of {"id", and "references", "answers" or "suffix"}', _is_jsonl, _jsonl),
    "mapping": Format("{id: text or list of texts}", _is_mapping, _mapping),
}
