"""Sections of numbers and words: tiles, scores with their intervals, tables, paragraphs, links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlm.report.page import heading, text


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
        return heading(self.title, self.note) + _scroll(f"<tr>{head}</tr>{body}")

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
        return heading(self.title, self.note) + _scroll(f"<tr>{head}</tr>{body}")


@dataclass(frozen=True)
class Text:
    """Paragraphs of plain text under a heading (no heading if the title is empty)."""

    title: str
    paragraphs: Sequence[str]

    def html(self) -> str:
        return heading(self.title) + "".join(f"<p>{text(paragraph)}</p>" for paragraph in self.paragraphs)


@dataclass(frozen=True)
class Links:
    """A line of links: what is shown -> where it leads, relative to the page."""

    title: str
    targets: Mapping[str, str]

    def html(self) -> str:
        links = (f'<a href="{text(target)}">{text(name)}</a>' for name, target in self.targets.items())
        return f"{heading(self.title)}<p>{' · '.join(links)}</p>"


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
