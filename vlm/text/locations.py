"""Boxes, points and masks as PaliGemma writes them: `<locDDDD>` and `<segDDD>` tokens.

    text = objects_to_text([Located("cat", box=(10, 20, 110, 220))], width=640, height=480)
    text_to_objects(text, width=640, height=480)

A place is a pair of tokens, first down, then across: `<locY><locX>`, each round(share * 1023), clipped to 0..1023, and
read again as t / 1023. A box is its upper left and its lower right place, `<locY0><locX0><locY1><locX1>`; after it may
follow sixteen `<seg>` tokens, the codes of its mask, and a label. Objects are joined by " ; ".

Source: big_vision `configs/proj/paligemma/transfers/`, `evaluators/proj/paligemma/transfers/segmentation.py`. (Demos of
the model card divide by 1024.)
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from vlm.errors import ConfigError, DataError

BINS = 1024
NUM_CODES = 128
MASK_TOKENS = 16
SEPARATOR = " ; "

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1: across, down, across, down."""
Point = tuple[float, float]
"""x, y."""
Move = Callable[[float, float], Point]
"""Where a place of the picture, in shares (x, y) of its width and height, has gone."""

_LOC = r"<loc(\d{4})>"
_CODES = r"<seg(?:0\d\d|1[01]\d|12[0-7])>"
_FOUR = re.compile(r"\s*".join([_LOC] * 4), re.ASCII)
_SEGMENT = re.compile(_LOC * 4 + rf"(?:{_CODES}){{{MASK_TOKENS}}}", re.ASCII)
_RUN = re.compile(r"(?:<loc\d{4}>)+|(?:<seg\d{3}>)+", re.ASCII)
_NUMBER = re.compile(r"\d+", re.ASCII)
# What was meant for a token: also with other digits, in capitals, escaped, cut off or without its bracket.
_MEANT = re.compile(
    r"(?:<|&lt;)\s*/?\s*(?:loc|seg)(?![a-z])[^<>\s]{0,12}(?:\s{0,2}[\d.]{0,8}\s{0,2}(?:>|&gt;))?"
    r"|(?<![<;a-z])(?:loc|seg)\d{1,6}\s?>"
    r"|\[(?:loc|seg)\d{1,6}\]",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"<loc(?:0\d{3}|10[01]\d|102[0-3])>|" + _CODES, re.ASCII)


@dataclass(frozen=True)
class Located:
    """One object of a text: a label with a box or a point, and the codes of its mask if there are any."""

    label: str = ""
    box: Box | None = None
    point: Point | None = None
    codes: tuple[int, ...] = ()
    """Sixteen numbers from 0 to 127, for `vlm.eval.segmentation.MaskDecoder`; they say the mask within the box."""


# --- To text ----------------------------------------------------------------------------------------------------------


def box_to_loc(box: Iterable[float], width: float = 1.0, height: float = 1.0) -> str:
    """The four tokens of a box x0, y0, x1, y1 in pixels of an image (with the defaults: in shares of it).

    What lies outside the image is clipped to it. Any four numbers will do, a row of an array or a tensor too.

    Raises:
        DataError: no four finite numbers, x1 < x0 or y1 < y0 (a box of another order or with a width), or no image.
    """
    x0, y0, x1, y1 = _numbers(box, 4, "a box is x0, y0, x1, y1")
    if x1 < x0 or y1 < y0:
        raise DataError(
            f"box {(x0, y0, x1, y1)}: the lower right corner lies before the upper left one; a box is x0, y0, x1, y1"
            " (not y first, and not a corner with width and height)"
        )
    return _place(x0, y0, width, height) + _place(x1, y1, width, height)


def point_to_loc(point: Iterable[float], width: float = 1.0, height: float = 1.0) -> str:
    """The two tokens of a point x, y. Raises DataError as `box_to_loc`."""
    x, y = _numbers(point, 2, "a point is x, y")
    return _place(x, y, width, height)


def codes_to_seg(codes: Sequence[int]) -> str:
    """The sixteen tokens of a mask's codes. Raises DataError for anything but sixteen whole numbers from 0 to 127."""
    numbers = [int(code) for code in codes if code == int(code)]
    if len(numbers) != len(codes) or len(numbers) != MASK_TOKENS or not all(0 <= n < NUM_CODES for n in numbers):
        raise DataError(f"a mask is {MASK_TOKENS} codes from 0 to {NUM_CODES - 1}, got {list(codes)}")
    return "".join(f"<seg{number:03d}>" for number in numbers)


def mask_to_seg(mask: object) -> str:
    """Always raises ConfigError: nobody has the encoder that would find a mask's codes."""
    raise ConfigError(
        "a mask cannot be written as <seg> tokens: Google published the decoder of the VQ-VAE that made them"
        " (vae-oid.npz), not its encoder; use data whose codes are known, `Located(codes=...)`"
    )


def objects_to_text(objects: Iterable[Located], width: float = 1.0, height: float = 1.0) -> str:
    """The text of several objects, as `detect` and `segment` answer: "<loc...> cat ; <loc...> dog".

    Raises:
        DataError: an object with neither box nor point or with both, codes without a box, a label that holds ";" or
            tokens, or as `box_to_loc`.
    """
    return SEPARATOR.join(_object_to_text(item, width, height) for item in objects)


def _object_to_text(item: Located, width: float, height: float) -> str:
    if (item.box is None) == (item.point is None):
        raise DataError(f"{item}: an object has a box or a point")
    if item.codes and item.box is None:
        raise DataError(f"{item}: the codes of a mask need its box")
    if ";" in item.label or _MEANT.search(item.label):
        raise DataError(f"label {item.label!r}: it may hold no ';', which separates objects, and no tokens")
    if item.box is None:
        where = point_to_loc(item.point or (), width, height)
    else:
        where = box_to_loc(item.box, width, height) + (codes_to_seg(item.codes) if item.codes else "")
    return f"{where} {item.label.strip()}".rstrip()


def _numbers(values: Iterable[float], how_many: int, what: str) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise DataError(f"{what}, got {values!r}") from error
    if len(numbers) != how_many or not all(map(math.isfinite, numbers)):
        raise DataError(f"{what}, {how_many} finite numbers; got {values!r}")
    return numbers


def _place(x: float, y: float, width: float, height: float) -> str:
    if not (width > 0 and height > 0):
        raise DataError(f"the image has the size {width} x {height}; both must be above 0")
    return "".join(f"<loc{min(max(round(share * (BINS - 1)), 0), BINS - 1):04d}>" for share in (y / height, x / width))


# --- From text --------------------------------------------------------------------------------------------------------


def text_to_objects(text: str, width: float = 1.0, height: float = 1.0) -> list[Located]:
    """The objects of a text, in its order; boxes and points in pixels (with the defaults: in shares of the image).

    What a part between two ";" says before its tokens is left out, the rest is the label. A part without tokens is
    passed over, so a text without any gives [].

    Raises:
        DataError: `problems` finds something.
    """
    wrong = problems(text)
    if wrong:
        raise DataError(f"{text!r}: {'; '.join(wrong)}")
    found: list[Located] = []
    for part in text.split(SEPARATOR.strip()):
        places = list(_places(part))
        for place, after in zip(places, [*places, None][1:], strict=True):
            label = part[place.end : len(part) if after is None else after.start].strip()
            corners = [(x * width, y * height) for x, y in place.corners]
            if len(corners) == 2:
                found.append(Located(label, box=(*corners[0], *corners[1]), codes=place.codes))
            else:
                found.append(Located(label, point=corners[0]))
    return found


def loc_to_box(text: str, width: float = 1.0, height: float = 1.0) -> Box | None:
    """The first four `<loc>` tokens in a row as x0, y0, x1, y1, in units of `width` and `height`.

    None if there are none, a number is above 1023, or the box has no area: for answers, which may be anything.
    """
    match = _FOUR.search(text)
    return None if match is None else tokens_to_box([int(number) for number in match.groups()], width, height)


def first_segment(text: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Tokens y0, x0, y1, x1 and codes of the segment that an answer starts with: four `<loc>`, sixteen `<seg>` tokens.

    None unless it is complete, in range, and its box has an area.
    """
    match = _SEGMENT.match(text)
    if match is None:
        return None
    numbers = tuple(map(int, _NUMBER.findall(match.group())))
    return None if tokens_to_box(numbers[:4]) is None else (numbers[:4], numbers[4:])


def tokens_to_box(numbers: Sequence[int], width: float = 1.0, height: float = 1.0) -> Box | None:
    """Tokens y0, x0, y1, x1 as x0, y0, x1, y1; None if one is above 1023 or the box has no area."""
    y0, x0, y1, x1 = (number / (BINS - 1) for number in numbers)
    if max(numbers) >= BINS or y1 <= y0 or x1 <= x0:
        return None
    return x0 * width, y0 * height, x1 * width, y1 * height


# --- Text that holds tokens -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A box (two corners) or a point (one) of a text without problems, in shares of the image."""

    start: int
    end: int
    corners: tuple[Point, ...]
    codes: tuple[int, ...]


def _places(text: str) -> Iterator[_Place]:
    runs = list(_RUN.finditer(text))
    for run, after in zip(runs, [*runs, None][1:], strict=True):
        numbers = [int(number) for number in _NUMBER.findall(run.group())]
        if run.group().startswith("<seg"):
            continue
        shares = [number / (BINS - 1) for number in numbers]
        corners = tuple((x, y) for y, x in zip(shares[::2], shares[1::2], strict=True))
        mask = after if after is not None and after.start() == run.end() else None
        codes = tuple(map(int, _NUMBER.findall(mask.group()))) if mask else ()
        yield _Place(run.start(), mask.end() if mask else run.end(), corners, codes)


def problems(text: str) -> list[str]:
    """What is wrong with the `<loc>` and `<seg>` tokens of a text, in sentences; [] if nothing is.

    What only looks like a token would be read as letters, in silence: `<loc1024>` is nine text tokens.
    """
    if "loc" not in (lowered := text.lower()) and "seg" not in lowered:
        return []
    meant = [match.group() for match in _MEANT.finditer(text)]
    wrong = [_misspelt(token) for token in dict.fromkeys(meant) if not _TOKEN.fullmatch(token)]
    return wrong or list(dict.fromkeys(_misplaced(text)))


def _misspelt(token: str) -> str:
    known = f"<loc0000> to <loc{BINS - 1}>" if "loc" in token.lower() else f"<seg000> to <seg{NUM_CODES - 1}>"
    hint = "; the border of the image is <loc1023>" if "loc1024" in token.lower() else ""
    return f"{token!r} is no token, and would be read as letters; there are {known}{hint}"


def _misplaced(text: str) -> Iterator[str]:
    runs = list(_RUN.finditer(text))
    for before, run in zip([None, *runs], runs, strict=False):
        numbers = [int(number) for number in _NUMBER.findall(run.group())]
        start = 0 if before is None else before.end()
        between = text[start : run.start()]
        if run.group().startswith("<seg"):
            boxed = before is not None and not between and before.group().startswith("<loc")
            if len(numbers) != MASK_TOKENS:
                yield f"{len(numbers)} <seg> tokens in a row; a mask is {MASK_TOKENS}"
            elif not boxed or before is None or before.group().count("<") != 4:
                yield "a mask without its box: sixteen <seg> tokens follow four <loc> tokens at once"
        elif before is not None and between and not between.strip() and before.group().startswith("<loc"):
            yield f"blanks between {before.group()[-9:]} and {run.group()[:9]}; the tokens of a box stand at once"
        elif len(numbers) not in (2, 4):
            yield (
                f"{len(numbers)} <loc> tokens in a row; a box is four, <locY0><locX0><locY1><locX1>, a point two, and"
                f" {SEPARATOR.strip()!r} stands between objects"
            )
        elif len(numbers) == 4 and (numbers[2] < numbers[0] or numbers[3] < numbers[1]):
            axis = "y1 < y0" if numbers[2] < numbers[0] else "x1 < x0"
            yield f"{run.group()}: {axis}; the order is <locY0><locX0><locY1><locX1>, upper left before lower right"


def move(text: str, to: Move) -> str | None:
    """The text with its boxes and points where `to` brings them; a box becomes the one around its moved corners.

    None where that would lose something: a point that leaves the picture, a box of which less than half is left, a
    masked box of which anything is cut. Masks stay as they are: their codes are relative to the box, so `to` may only
    shift and stretch a picture that has them.

    Args:
        text: without `problems`.
    """
    pieces, done = [], 0
    for place in _places(text):
        ends = [to(x, y) for x, y in place.corners]
        x0, y0 = (min(end[axis] for end in ends) for axis in (0, 1))
        x1, y1 = (max(end[axis] for end in ends) for axis in (0, 1))
        if not _kept((x0, y0, x1, y1), whole=len(ends) == 1 or bool(place.codes)):
            return None
        where = _place(x0, y0, 1, 1) + (_place(x1, y1, 1, 1) if len(ends) == 2 else "")
        pieces += [text[done : place.start], where, codes_to_seg(place.codes) if place.codes else ""]
        done = place.end
    return "".join([*pieces, text[done:]])


def _kept(box: Box, *, whole: bool) -> bool:
    """Whether enough of a moved box lies in the picture."""
    shares = []
    for low, high in (box[::2], box[1::2]):
        if low > 1 or high < 0:
            return False
        shares.append((min(high, 1) - max(low, 0)) / (high - low) if high > low else 1.0)
    return math.prod(shares) >= (1 - 1e-9 if whole else 0.5)
