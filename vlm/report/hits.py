"""What a search found, as cards: best first, each with its picture or text, its score and its id.

    write_report("gallery.html", title="a red star", sections=[Hits("a red star", hits, total=300)])

`card` is the one look of a hit, for this page and for the one that searches while it is open.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vlm.errors import ImageError
from vlm.report.page import text
from vlm.report.pictures import ImageLike, small

_DECODERS = 4


@dataclass(frozen=True)
class Hit:
    """One found entry.

    Attributes:
        image: its picture; a broken one is shown as a note, never raised. None where there is none.
        text: what was embedded, in a collection of texts; of a picture, what is said of it.
    """

    id: str
    score: float
    rank: int
    image: ImageLike | None = None
    text: str = ""


@dataclass(frozen=True)
class Hits:
    """What one query found.

    Attributes:
        query: what was asked, in words.
        total: entries of the collection.
        note: how it was searched: the filter, the meaning of the scores, the time.
        image: the picture that was asked with, if any.
    """

    query: str
    hits: Sequence[Hit]
    total: int
    note: str = ""
    image: ImageLike | None = None

    def html(self) -> str:
        with ThreadPoolExecutor(_DECODERS) as decoders:  # decoding waits for files and leaves Python's lock
            pictures = list(decoders.map(_picture, self.hits))
        cards = "".join(card(hit, picture) for hit, picture in zip(self.hits, pictures, strict=True))
        found = f'<div class="hits">{cards}</div>' if cards else '<p class="empty">nothing was found</p>'
        asked = f'<div class="asked">{_shown(self.image, self.query)}</div>' if self.image is not None else ""
        count = f"<b>{len(self.hits):,}</b> of {self.total:,}"
        return (
            f'<section class="found"><div class="about">{asked}<div><h2><bdi>{text(self.query)}</bdi></h2>'
            f'<p class="note">{count}{" · " + text(self.note) if self.note else ""}</p></div></div>{found}</section>'
        )


def card(hit: Hit, picture: str, action: str = "") -> str:
    """One card.

    Args:
        picture: HTML of what is shown at its top; "" where the text of the hit is shown instead.
        action: HTML beside the score.
    """
    folder, name = split(hit.id)
    top = f'<div class="picture">{picture}</div>' if picture else ""
    said = f'<p class="text"><bdi>{text(hit.text)}</bdi></p>' if hit.text else ""
    return (
        f'<article class="hit">{top}<div class="body">'
        f'<div class="line"><span class="rank">{hit.rank}</span>{action}<b class="score">{hit.score:.4f}</b></div>'
        f'{said}<code class="name" title="{text(hit.id)}"><bdi>{text(name)}</bdi></code>'
        f'<code class="folder" title="{text(folder)}"><bdi>{text(folder)}</bdi></code></div></article>'
    )


def split(id: str) -> tuple[str, str]:
    """(folder, name) of an id that is a path; the folder is "" where it is none."""
    folder, _, name = id.rpartition("/")
    return (folder, name) if name else ("", id)


def _picture(hit: Hit) -> str:
    return "" if hit.image is None else _shown(hit.image, hit.text or hit.id)


def _shown(image: ImageLike, alt: str) -> str:
    try:
        return small(image).html(alt)
    except ImageError as error:
        return f"<span>picture not readable: {text(error.code)}</span>"
