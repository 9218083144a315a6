"""The page of `vlm demo --task search`: figures beside chance, and what each search found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm.report.page import Section
from vlm.report.scores import Stat, Table, Text
from vlm.report.sections import Gallery, GalleryItem, write_report

ABOUT = (
    "A small SigLIP with both towers, trained on drawn scenes alone, looks at pictures that it has never seen: each "
    "holds at least one thing in a place where no thing of its colour and shape ever stood in training. Pictures and "
    "texts become vectors; the cosine of two, scaled and shifted by two learnt numbers and put through a sigmoid, is "
    "the probability that the text is true of the picture. Each text is judged alone, nothing is shared out."
)
HEADLINES = {
    "text_to_image_true": "first picture fits its caption",
    "zero_shot_colour": "colour named right",
    "zero_shot_shape": "shape named right",
    "zero_shot_number": "number named right",
    "relation": "relation read right",
}


def write(out: Path, facts: dict[str, Any]) -> Path:
    """`out/report.html`."""
    by_name = {figure["name"]: figure for figure in facts["figures"]}
    stats = [
        Stat(title, percent(by_name[name]["value"]), f"chance {percent(by_name[name]['chance'])}", _tone(by_name[name]))
        for name, title in HEADLINES.items()
    ]
    rows = [
        [
            f["text"],
            percent(f["value"]),
            "" if f["chance"] is None else percent(f["chance"]),
            percent(f["best"]),
            f["asked"],
        ]
        for f in facts["figures"]
    ]
    sections: list[Section] = [
        Text("What this is", [ABOUT]),
        Table("Figures", ["share of", "value", "chance", "best", "asked"], rows, note=BEST),
        *(Gallery(_cards(out, search), search["query"], _note(search)) for search in facts["searches"]),
    ]
    return write_report(
        out / "report.html",
        title="vlm demo: search",
        subtitle="Held-out scenes, embedded once and searched with words",
        stats=stats,
        sections=sections,
        footer=[f"model {facts['model']}, seed {facts['seed']}"],
    )


BEST = "Best is what a reader without fault would get: some captions are true of several pictures."


def _tone(figure: dict[str, Any]) -> str:
    return "good" if figure["value"] > 2 * figure["chance"] else "bad"


def _note(search: dict[str, Any]) -> str:
    return f"{search['fitting']} pictures fit; the first ones found, with the probability of the text being true"


def _cards(out: Path, search: dict[str, Any]) -> list[GalleryItem]:
    return [
        GalleryItem(
            out / result["image"], "", percent(result["probability"]), [], correct=result["fits"], id=result["image"]
        )
        for result in search["results"]
    ]


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"
