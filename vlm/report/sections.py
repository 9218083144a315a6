"""One HTML page that shows what a model did: scores with their uncertainty, curves, tables and a gallery of items.

    write_report(
        "report.html", title="easy-VQA", summary=[Score("accuracy", 0.97, interval=(0.96, 0.98), num_items=9673)],
        gallery=[GalleryItem(image, "answer en what shape?", "circle", ["circle"], correct=True)],
    )

The page is one file without external resources. Every text is escaped, every image embedded. A page is a list of
sections, each of which turns itself into HTML; `stats`, `summary`, `curves` and `gallery` are short forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm.errors import ImageError
from vlm.files import write_text
from vlm.report.charts import Curve, Scatter, draw, draw_scatter
from vlm.report.page import Section, heading, page, text
from vlm.report.pictures import ImageLike, small
from vlm.report.scores import Score, Scores, Stat, Stats

_LARGEST = 480  # px; longer sides are scaled down to this, which keeps a gallery of 100 photos near 4 MB


@dataclass(frozen=True)
class Figure:
    """A picture (a plot, a contact sheet) shown in full width of its panel."""

    image: ImageLike
    caption: str = ""


@dataclass(frozen=True)
class GalleryItem:
    """One card: an image with what was asked, said and expected.

    Attributes:
        image: path, bytes or Pillow image; None where there is none. A broken one is shown as a note, never raised.
        correct: True or False puts a badge and a filter; None where right and wrong mean nothing.
        score: shown where `correct` is None.
        kind: group for the filter menu, such as the kind of question.
        note: a further line, such as what another model said.
        pick: why the item is shown, such as best, worst or random; a filter where cards have several.
        answers: what several models said, as (model, text, right or wrong or None); instead of `prediction`.
    """

    image: ImageLike | None
    prompt: str
    prediction: str
    references: Sequence[str]
    correct: bool | None = None
    score: float | None = None
    id: str = ""
    kind: str = ""
    note: str = ""
    pick: str = ""
    answers: Sequence[tuple[str, str, bool | None]] = ()


# --- Sections -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curves:
    """Panels with charts (`Curve`, `Scatter`) and pictures (`Figure`, or just an image)."""

    items: Sequence[Curve | Scatter | Figure | ImageLike]
    title: str = "Curves"
    note: str = ""

    def html(self) -> str:
        panels = "".join(f'<figure class="panel">{self._panel(item)}</figure>' for item in self.items)
        return heading(self.title, self.note) + f'<div class="panels">{panels}</div>'

    @staticmethod
    def _panel(item: Curve | Scatter | Figure | ImageLike) -> str:
        if isinstance(item, Scatter):
            return f"<h3>{text(item.title)}</h3>{draw_scatter(item)}"
        if isinstance(item, Curve):
            return f"<h3>{text(item.title)}</h3>{draw(item)}"
        figure = item if isinstance(item, Figure) else Figure(item)
        caption = f"<figcaption>{text(figure.caption)}</figcaption>" if figure.caption else ""
        return small(figure.image, 1600, exact=True).html() + caption


@dataclass(frozen=True)
class Gallery:
    """Cards with filters for right and wrong, and a menu of kinds where there are several."""

    items: Sequence[GalleryItem]
    title: str = "Gallery"
    note: str = ""

    def html(self) -> str:
        if not self.items:
            return heading(self.title, self.note) + '<p class="empty">no items</p>'
        cards = "".join(_card(item) for item in self.items)
        small = " small" if all(len(item.prediction) < 40 for item in self.items) else ""
        return (
            f"<section data-gallery>{heading(self.title, self.note)}{self._filters()}"
            f'<div class="gallery{small}">{cards}</div></section>'
        )

    def _filters(self) -> str:
        marks = [_mark(item) for item in self.items]
        parts = []
        names = ["right", "wrong"] if {"right", "wrong"} & set(marks) else list(dict.fromkeys(filter(None, marks)))
        if names:
            shown = [("all", len(marks)), *((name, marks.count(name)) for name in names)]
            parts = [
                f'<button type="button" data-show="{text(name)}" aria-pressed="{str(name == "all").lower()}">'
                f"{text(name)} {count}</button>"
                for name, count in shown
            ]
        kinds = sorted({item.kind for item in self.items if item.kind})
        if len(kinds) > 1:
            options = "".join(f'<option value="{text(kind)}">{text(kind)}</option>' for kind in kinds)
            parts.append(f'<select aria-label="kind"><option value="">every kind</option>{options}</select>')
        return f'<div class="filters">{"".join(parts)}</div>' if parts else ""


# --- The page -------------------------------------------------------------------------------------------------------


def write_report(
    path: str | Path,
    *,
    title: str,
    subtitle: str = "",
    stats: Sequence[Stat] = (),
    summary: Sequence[Score] = (),
    curves: Sequence[Curve | Scatter | Figure | ImageLike] = (),
    gallery: Sequence[GalleryItem] = (),
    sections: Sequence[Section] = (),
    footer: Sequence[str] = (),
) -> Path:
    """Write one self-contained HTML page.

    The order on the page is stats, summary, sections, curves, gallery; to choose another, give all in `sections`.

    Args:
        path: the file to write; folders are made. It is replaced in one step, so a reader never sees half a page.
        subtitle: a line below the title, such as model and data.
        footer: lines of small print, such as versions and settings.

    Returns:
        The path of the file.

    Raises:
        ImageError: a `Figure` that cannot be read (a broken gallery image becomes a note on its card).
        OSError: the file cannot be written.
    """
    parts: list[Section] = [Stats(stats)] if stats else []
    parts += [Scores(summary)] if summary else []
    parts += sections
    parts += [Curves(curves)] if curves else []
    parts += [Gallery(gallery)] if gallery else []
    lead = f'<p class="soft">{text(subtitle)}</p>' if subtitle else ""
    body = f"<header><h1>{text(title)}</h1>{lead}</header>\n" + "\n".join(part.html() for part in parts)
    if footer:
        body += f"<footer>{''.join(f'<p>{text(line)}</p>' for line in footer)}</footer>"
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, page(title, body))
    return target


# --- Pieces ---------------------------------------------------------------------------------------------------------


def _mark(item: GalleryItem) -> str:
    return item.pick if item.correct is None else "right" if item.correct else "wrong"


def _card(item: GalleryItem) -> str:
    said = "".join(_answer(*answer) for answer in item.answers) or _said(item.prediction)
    gold = " · ".join(f"<bdi>{text(reference)}</bdi>" for reference in dict.fromkeys(item.references))
    gold = f'<div class="gold">expected: {gold}</div>' if gold else ""
    note = f'<div class="gold">{text(item.note)}</div>' if item.note else ""
    return (
        f'<article class="card" data-mark="{text(_mark(item))}" data-kind="{text(item.kind)}">'
        f'<div class="picture">{_picture(item.image)}</div><div class="body">'
        f'<div class="prompt"><bdi>{text(item.prompt)}</bdi></div>{said}{gold}{note}'
        f'<div class="foot"><code>{text(item.id)}</code>{_badge(item)}</div></div></article>'
    )


def _said(prediction: str) -> str:
    if not prediction.strip():
        return '<div class="said none">(empty)</div>'
    return f'<div class="said"><bdi>{text(prediction)}</bdi></div>'


def _answer(name: str, said: str, right: bool | None) -> str:
    mark = {None: "", True: '<b class="yes">✓</b>', False: '<b class="no">✗</b>'}[right]
    shown = f"<bdi>{text(said)}</bdi>" if said.strip() else '<span class="none">(empty)</span>'
    return f'<div class="answer"><span class="by">{text(name)}</span><span>{mark} {shown}</span></div>'


def _badge(item: GalleryItem) -> str:
    if item.correct is not None:
        return (
            '<span class="badge right">✓ right</span>' if item.correct else '<span class="badge wrong">✗ wrong</span>'
        )
    label = f"{item.pick} · " if item.pick else ""
    return "" if item.score is None else f'<span class="badge score">{text(label)}{item.score:.2f}</span>'


def _picture(image: ImageLike | None) -> str:
    if image is None:
        return "<span>no image</span>"
    try:
        return small(image, _LARGEST).html()
    except ImageError as error:
        return f"<span>image not readable: {text(error.code)}</span>"
