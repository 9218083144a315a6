"""One HTML page that shows what a model did: scores with their uncertainty, curves, tables and a gallery of items.

    write_report(
        "report.html", title="easy-VQA", summary=[Score("accuracy", 0.97, interval=(0.96, 0.98), num_items=9673)],
        gallery=[GalleryItem(image, "answer en what shape?", "circle", ["circle"], correct=True)],
    )

The page is one file without external resources. Every text is escaped, every image embedded. A page is a list of
sections, each of which turns itself into HTML; `stats`, `summary`, `curves` and `gallery` are short forms.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from vlm.errors import ImageError
from vlm.files import write_text
from vlm.images.load import load_image
from vlm.report.charts import Curve, Scatter, draw, draw_scatter
from vlm.report.page import page, text

ImageLike = str | Path | bytes | Image.Image

_TINY = 160  # px; up to here images are embedded as they are and enlarged with hard pixel edges
_LARGEST = 480  # px; longer sides are scaled down to this, which keeps a gallery of 100 photos near 4 MB


class Section(Protocol):
    """Part of a page. `html` returns safe HTML: whatever came from outside is escaped."""

    def html(self) -> str: ...


# --- Parts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stat:
    """One headline number in a tile: `value` is shown as it is; `tone` may be "", "good" or "bad"."""

    label: str
    value: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Score:
    """One row of a score table.

    Attributes:
        name: what was measured.
        value: a number, or a text that is shown as it is.
        interval: ends of the 95 % interval on the scale of `value`.
        num_items: the denominator.
        note: a line below the name, such as the rule of the metric.
        maximum: full length of the bar; None draws no bar.
        percent: show 0.953 as 95.3 %.
    """

    name: str
    value: float | str
    interval: tuple[float, float] | None = None
    num_items: int | None = None
    note: str = ""
    maximum: float | None = 1.0
    percent: bool = False


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
class Stats:
    """Tiles with headline numbers."""

    items: Sequence[Stat]

    def html(self) -> str:
        tiles = (
            f'<div class="stat {text(item.tone)}"><span>{text(item.label)}</span><b>{text(item.value)}</b>'
            + (f"<span>{text(item.note)}</span>" if item.note else "")
            + "</div>"
            for item in self.items
        )
        return f'<div class="stats">{"".join(tiles)}</div>'


@dataclass(frozen=True)
class Scores:
    """A table of scores with bars and interval whiskers."""

    rows: Sequence[Score]
    title: str = "Scores"
    note: str = ""

    def html(self) -> str:
        with_items = any(row.num_items is not None for row in self.rows)
        with_interval = any(row.interval is not None for row in self.rows)
        head = "<th></th><th class='num'>value</th>"
        head += "<th class='num'>95 % interval</th>" if with_interval else ""
        head += "<th class='graph'></th>" + ("<th class='num'>items</th>" if with_items else "")
        body = "".join(self._row(row, with_interval, with_items) for row in self.rows)
        return _heading(self.title, self.note) + _scroll(f"<tr>{head}</tr>{body}")

    @staticmethod
    def _row(row: Score, with_interval: bool, with_items: bool) -> str:
        name = text(row.name).replace("_", "_<wbr>")  # a long metric name may break where a reader would break it
        cells = f"<td>{name}</td><td class='num'><b>{_value(row.value, row.percent)}</b></td>"
        if with_interval:
            ends = [_value(end, row.percent) for end in row.interval or ()]
            cells += f"<td class='num'>{' – '.join(ends)}</td>"
        cells += f"<td class='graph'>{_bar(row)}</td>"
        cells += f"<td class='num'>{'' if row.num_items is None else f'{row.num_items:,}'}</td>" if with_items else ""
        if not row.note:
            return f"<tr>{cells}</tr>"
        # A row of its own: beside the numbers a sentence would be squeezed into a column of single words on a phone.
        width = 3 + with_interval + with_items
        return f"<tr class='noted'>{cells}</tr><tr><td class='why' colspan='{width}'>{text(row.note)}</td></tr>"


@dataclass(frozen=True)
class Table:
    """Any table: texts stay left, numbers go right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int]]
    note: str = ""

    def html(self) -> str:
        numeric = [all(isinstance(row[i], int | float) for row in self.rows) for i in range(len(self.columns))]
        classes = [" class='num'" if is_number else "" for is_number in numeric]
        head = "".join(f"<th{cls}>{text(name)}</th>" for name, cls in zip(self.columns, classes, strict=True))
        body = "".join(
            "<tr>" + "".join(f"<td{cls}>{_value(cell)}</td>" for cell, cls in zip(row, classes, strict=True)) + "</tr>"
            for row in self.rows
        )
        return _heading(self.title, self.note) + _scroll(f"<tr>{head}</tr>{body}")


@dataclass(frozen=True)
class Text:
    """Paragraphs of plain text under a heading (no heading if the title is empty)."""

    title: str
    paragraphs: Sequence[str]

    def html(self) -> str:
        return _heading(self.title) + "".join(f"<p>{text(paragraph)}</p>" for paragraph in self.paragraphs)


@dataclass(frozen=True)
class Curves:
    """Panels with charts (`Curve`, `Scatter`) and pictures (`Figure`, or just an image)."""

    items: Sequence[Curve | Scatter | Figure | ImageLike]
    title: str = "Curves"
    note: str = ""

    def html(self) -> str:
        panels = "".join(f'<figure class="panel">{self._panel(item)}</figure>' for item in self.items)
        return _heading(self.title, self.note) + f'<div class="panels">{panels}</div>'

    @staticmethod
    def _panel(item: Curve | Scatter | Figure | ImageLike) -> str:
        if isinstance(item, Scatter):
            return f"<h3>{text(item.title)}</h3>{draw_scatter(item)}"
        if isinstance(item, Curve):
            return f"<h3>{text(item.title)}</h3>{draw(item)}"
        figure = item if isinstance(item, Figure) else Figure(item)
        caption = f"<figcaption>{text(figure.caption)}</figcaption>" if figure.caption else ""
        return _image(figure.image, largest=1600) + caption


@dataclass(frozen=True)
class Gallery:
    """Cards with filters for right and wrong, and a menu of kinds where there are several."""

    items: Sequence[GalleryItem]
    title: str = "Gallery"
    note: str = ""

    def html(self) -> str:
        if not self.items:
            return _heading(self.title, self.note) + '<p class="empty">no items</p>'
        cards = "".join(_card(item) for item in self.items)
        small = " small" if all(len(item.prediction) < 40 for item in self.items) else ""
        return (
            f"<section data-gallery>{_heading(self.title, self.note)}{self._filters()}"
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


def breakdown(
    scores: Mapping[str, float],
    kinds: Mapping[str, str],
    *,
    metric: str,
    percent: bool = False,
    limit: int = 16,
    by: str = "kind of prompt",
) -> Scores:
    """A table of mean scores per kind of item, largest kinds first; what exceeds `limit` rows goes into "other".

    Args:
        scores: item id -> score.
        kinds: item id -> kind; every scored id needs one.
        metric, by: names for the heading.
    """
    groups: dict[str, list[float]] = {}
    for key, score in scores.items():
        groups.setdefault(kinds[key], []).append(score)
    ordered = sorted(groups.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    kept, rest = (ordered, []) if len(ordered) <= limit else (ordered[: limit - 1], ordered[limit - 1 :])
    if rest:
        kept.append((f"other ({len(rest)} kinds)", [score for _, values in rest for score in values]))
    top = max(1.0, max(scores.values(), default=1.0))
    rows = [
        Score(kind, sum(values) / len(values), num_items=len(values), maximum=top, percent=percent)
        for kind, values in kept
    ]
    return Scores(rows, title=f"{metric} by {by.replace('_', ' ')}")


# --- Pieces ---------------------------------------------------------------------------------------------------------


def _heading(title: str, note: str = "") -> str:
    return (f"<h2>{text(title)}</h2>" if title else "") + (f'<p class="note">{text(note)}</p>' if note else "")


def _scroll(rows: str) -> str:
    return f'<div class="scroll"><table>{rows}</table></div>'


def _value(value: float | int | str, percent: bool = False) -> str:
    if isinstance(value, str):
        return text(value)
    if percent:
        return f"{100 * value:.1f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3f}"


def _bar(row: Score) -> str:
    if isinstance(row.value, str) or not row.maximum:
        return ""
    width = [100 * min(1.0, max(0.0, end / row.maximum)) for end in (row.value, *(row.interval or ()))]
    whisker = f'<u style="left:{width[1]:.2f}%;right:{100 - width[2]:.2f}%"></u>' if row.interval else ""
    return f'<div class="bar"><i style="width:{width[0]:.2f}%"></i>{whisker}</div>'


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
        return _image(image, largest=_LARGEST)
    except ImageError as error:
        return f"<span>image not readable: {text(error.code)}</span>"


def _image(source: ImageLike, *, largest: int) -> str:
    """An `<img>` with the picture inside: PNG where pixels matter (tiny images, figures), else JPEG."""
    image = load_image(source).copy()  # `thumbnail` works in place; the picture may be the caller's
    tiny = max(image.size) <= _TINY
    image.thumbnail((largest, largest))
    png = tiny or largest > _LARGEST
    buffer = io.BytesIO()
    if png:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=84)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    css = ' class="tiny"' if tiny else ""
    return f'<img{css} alt="" loading="lazy" src="data:image/{"png" if png else "jpeg"};base64,{data}">'
