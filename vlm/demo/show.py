"""What the demo shows: figures and captioned pictures in the terminal, and the HTML report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.demo.answers import Answers
from vlm.report.page import Section
from vlm.report.scores import Score, Scores, Stat, Text
from vlm.report.sections import Gallery, GalleryItem
from vlm.report.sections import write_report as write_page
from vlm.train import step_log

PICTURES_SHOWN = 6
CELLS = 24
"""Width of a picture in the terminal, in characters; two pixels stand above each other in each."""
WHAT = {
    "vqa_accuracy": "answers right, on scenes with held-out combinations of colour, shape and place",
    "vqa_accuracy_shuffled": "the same model with the pictures shuffled among the questions",
    "vqa_accuracy_question_only": "best constant answer to each kind of question, without a picture",
    "vqa_accuracy_untrained": "before training: the projector is zero, the decoder sees no picture",
    "caption_accuracy": "captions that are true of the picture",
}


def print_results(out: Path, facts: dict[str, Any], answers: Answers) -> None:
    """Figures, some captions and the report's path, on stdout."""
    print()
    for line in answers.captions[:: max(1, len(answers.captions) // PICTURES_SHOWN)][:PICTURES_SHOWN]:
        path = answers.data / line["image"]
        print(half_blocks(path) if sys.stdout.isatty() else path)
        mark = "true" if answers.verdicts()[line["id"]].true else "not true"
        print(f'  "{answers.said["captions"][line["id"]]}" ({mark})\n')
    for name, meaning in WHAT.items():
        print(f"{100 * facts[name]:5.1f} %  {meaning}")
    print(f"{facts['cider']:7.2f}  CIDEr of the captions")
    print(f"{facts['seconds']:5.0f} s  in all, {facts['peak_memory_gb']:.1f} GB of memory at most")
    if not facts.get("encoder", {"shipped": True})["shipped"]:  # a directory of an older version says nothing
        print(tower_line(facts))
    print(f"model   {out / 'model'}\nreport  {out / 'report.html'}")


def tower_line(facts: dict[str, Any]) -> str:
    return f"tower   {facts['encoder']['kind']}: {facts['encoder']['weights']}"


def half_blocks(path: Path) -> str:
    """A picture as coloured half blocks for a terminal with 24-bit colours."""
    with Image.open(path) as opened:
        image = opened.convert("RGB").resize((CELLS, CELLS), Image.Resampling.BOX)
    rows = []
    for y in range(0, CELLS, 2):
        cells = []
        for x in range(CELLS):
            above, below = (";".join(map(str, image.getpixel((x, y + k)))) for k in (0, 1))  # type: ignore[arg-type]
            cells.append(f"\x1b[38;2;{above}m\x1b[48;2;{below}m▀")
        rows.append("  " + "".join(cells) + "\x1b[0m")
    return "\n".join(rows)


def write_report(out: Path, facts: dict[str, Any], answers: Answers) -> Path:
    """`out/report.html`: figures, curves of both stages, and every test picture with what the model said."""
    stats = [
        Stat("answers right", _percent(facts["vqa_accuracy"]), f"{facts['num_questions']} questions", "good"),
        Stat("pictures shuffled", _percent(facts["vqa_accuracy_shuffled"]), "so the model looks at the picture"),
        Stat("captions true", _percent(facts["caption_accuracy"]), f"{facts['num_captions']} pictures", "good"),
        Stat("time", f"{facts['seconds']:.0f} s", f"{facts['peak_memory_gb']:.1f} GB of memory"),
    ]
    summary = [Score(meaning, facts[name], percent=True) for name, meaning in WHAT.items()]
    kinds = [Score(kind, value, percent=True) for kind, value in facts["vqa_accuracy_by_kind"].items()]
    sections: list[Section] = [
        Text("What this is", [ABOUT, tower_line(facts)]),
        Scores(kinds, title="Answers right by kind of question"),
    ]
    galleries = [
        Gallery(_caption_cards(answers), title="Captions", note="Right means true of the picture, by the checker."),
        Gallery(_answer_cards(answers), title="Answers"),
    ]
    return write_page(
        out / "report.html",
        title="vlm demo",
        subtitle="A small vision tower, a projector and a small Gemma, trained in two stages on drawn scenes",
        stats=stats,
        summary=summary,
        curves=step_log.curves(out / "train" / "metrics.csv"),
        sections=[*sections, *galleries],
        footer=[", ".join(f"{name} {version}" for name, version in facts["versions"].items()), f"seed {facts['seed']}"],
    )


ABOUT = (
    "Held out are combinations of colour, shape and place: every test scene holds at least one thing in a place where "
    "no thing of its colour and shape stands in any training picture, caption or question, nor in the pretraining of "
    "the tower or the decoder. (The colour and the shape together do occur there, in other places.) The shuffled "
    "pictures show how far the questions alone lead; a model that did not look would score the same with them."
)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _caption_cards(answers: Answers) -> list[GalleryItem]:
    verdicts = answers.verdicts()
    return [
        GalleryItem(
            answers.data / line["image"],
            line["prefix"],
            answers.said["captions"][line["id"]],
            line["references"][:3],
            correct=verdicts[line["id"]].true,
            id=line["id"],
            kind="caption",
            note=verdicts[line["id"]].reason,
        )
        for line in answers.captions
    ]


def _answer_cards(answers: Answers) -> list[GalleryItem]:
    return [
        GalleryItem(
            answers.data / line["image"],
            line["prefix"],
            answers.said["answers"][line["id"]],
            [line["suffix"]],
            correct=answers.said["answers"][line["id"]] == line["suffix"],
            id=line["id"],
            kind=line["kind"],
            note=f"with another picture: {answers.said['answers_shuffled'][line['id']]}",
        )
        for line in answers.questions
    ]
