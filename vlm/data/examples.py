"""Annotations: one JSON object per line, checked as a whole before anything is trained or scored.

    {"image": "images/0001.jpg", "prefix": "caption en", "suffix": "a red car"}
    {"image": "images/0002.jpg", "prefix": "answer en what colour?", "answers": ["red", "red", "dark red"], "id": "q7"}
    {"images": ["a.jpg", "b.jpg"], "prefix": "answer en what changed?", "suffix": "the car is gone"}
    {"prefix": "answer en what is the capital of France?", "suffix": "Paris"}

    image       path below the image root (the file's own folder by default); nothing else is ever opened, no URLs
    images      instead of `image`, several of them in the order in which the model sees them; `[]` is none
    prefix      what the model is asked; may be empty
    suffix      what the model should say: the training target; "" is "nothing to say" and teaches to stop at once
    references  captions that an evaluation compares with (a list of text)
    answers     answers of different people to the same question (a list of text)
    id          text or a whole number, unique in the file; the line number by default

A line without `image` and `images` is about text alone. Other keys are kept in `Example.info`, unless something that
was meant for the model would be lost with them. Refused are: a key that resembles one of these (`answer`, `suffix2`,
`image_2`, and `image` beside `images`), dialogues (`conversations`, `messages`), `video` and `audio`, a key whose value
is an image that the line does not show otherwise, and in a line without an image every key that speaks of one. Probes
of a vision tower read `{"image": ..., "label": ...}` instead.
"""

import difflib
import functools
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from vlm.data import strictjson
from vlm.errors import DataError
from vlm.images.load import shown
from vlm.text import control, locations

MAX_LINE_BYTES = 2**20
MAX_LISTED = 1000
"""How many problems an error message lists; it always says how many there are."""
MAX_ALIKE = 3
"""More lines with the same mistake are one problem in a message, with their count and numbers."""
KEYS = ("id", "image", "images", "prefix", "suffix", "references", "answers")
LABELLED_KEYS = ("id", "image", "label")


@dataclass(frozen=True)
class Example:
    """One annotation that passed every check; the image has not been decoded yet."""

    id: str
    image: Path | Image.Image | None
    """None: about text alone."""
    prefix: str
    suffix: str | None
    references: tuple[str, ...]
    answers: tuple[str, ...]
    file: str
    line: int
    more_images: tuple[Path | Image.Image, ...] = ()
    """Images that follow `image`, where a prompt is about several."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else is known of the item and metrics or breakdowns read: choices, question type, language, ... From an
    annotation file: its other keys, as they are."""

    @property
    def images(self) -> tuple[Path | Image.Image, ...]:
        """All images, in the order in which the model sees them."""
        return () if self.image is None else (self.image, *self.more_images)


@dataclass(frozen=True)
class Labelled:
    """An image of a known class; it has not been decoded yet."""

    id: str
    image: Path | Image.Image
    label: str

    @property
    def images(self) -> tuple[Path | Image.Image, ...]:
        """The image, as `Example` has it."""
        return (self.image,)


_T = TypeVar("_T", Example, Labelled)


@dataclass(frozen=True)
class Problem:
    """Why one line of an annotation file cannot be used."""

    file: str
    line: int
    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.code}: {self.message}"


class _Refused(Exception):
    """A line that cannot be used: carries the code and the message of its `Problem`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def read_jsonl(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    require: Sequence[str] = ("suffix",),
    skip_bad: bool = False,
) -> tuple[list[Example], list[Problem]]:
    """All examples of an annotation file, in order, and the problems of the lines that were skipped.

    Args:
        path: the JSONL file (UTF-8).
        image_root: folder that holds the images. No image outside it is accepted, symbolic links included.
        require: which of `suffix`, `references` and `answers` every line must have; `prefix` always.
        skip_bad: skip unusable lines and return their problems, instead of refusing the file.

    Raises:
        DataError: the file itself is unusable, or (without `skip_bad`) lines are: all of them are listed with file,
            line and code, not only the first.
    """
    unknown = set(require) - {"suffix", "references", "answers"}
    assert not unknown, unknown
    return _read(path, image_root, skip_bad, functools.partial(_example, require=require))


def without_control(examples: Sequence[Example], setting: str, *, strip: bool) -> list[Example]:
    """The examples, with control spellings removed from their texts if `strip`, and told once per file in any case.

    Args:
        setting: what removes them, for the message: `--strip-control`.
    """
    counts: dict[str, control.Count] = {}
    made = []
    for example in examples:
        prompt = control.find(example.prefix)
        target = [] if example.suffix is None else control.find(example.suffix, prompt=False)
        counts.setdefault(example.file, control.Count()).add(dict.fromkeys([*prompt, *target]), example.line)
        if strip and (prompt or target):
            suffix = example.suffix if example.suffix is None else control.strip_control(example.suffix, prompt=False)
            example = replace(example, prefix=control.strip_control(example.prefix), suffix=suffix)
        made.append(example)
    for file, count in counts.items():
        count.tell(file or "examples in memory", setting, stripped=strip)
    return made


def read_labelled(path: str | Path, image_root: str | Path | None = None) -> list[Labelled]:
    """Images with a class each, `{"image": ..., "label": ...}` per line (and `id` if wanted), in order.

    Raises:
        DataError: as `read_jsonl` without `skip_bad`: every unusable line is listed.
    """
    return _read(path, image_root, False, _labelled)[0]


def _read(
    path: str | Path, image_root: str | Path | None, skip_bad: bool, make: Callable[[bytes, int, str, "_ImageRoot"], _T]
) -> tuple[list[_T], list[Problem]]:
    """What `make(line, number, file, images)` makes of every line, and why it could not."""
    name = shown(path)
    images = _ImageRoot(Path(path).parent if image_root is None else image_root)
    made: list[_T] = []
    problems: list[Problem] = []
    lines_by_id: dict[str, int] = {}
    for number, line in _lines(path, name):
        try:
            item = make(line, number, name, images)
            if item.id in lines_by_id:
                raise _Refused("duplicate-id", f"id {item.id!r} is that of line {lines_by_id[item.id]} already")
        except _Refused as refused:
            problems.append(Problem(name, number, refused.code, str(refused)))
            continue
        lines_by_id[item.id] = number
        made.append(item)
    if problems and (not skip_bad or not made):
        raise DataError(_listing(problems, name, len(made)))
    if not made:
        raise DataError(f"{name}: no annotation in the file; expected one JSON object per line")
    return made, problems


def _listing(problems: list[Problem], name: str, num_good: int) -> str:
    """One problem as one line; several under a line that counts them."""
    if len(problems) == 1 and num_good:
        return str(problems[0])
    total = len(problems) + num_good
    lines = listing(problems)
    if len(lines) == 1 and len(problems) > 1:
        return f"{lines[0]} ({total:,} annotations in the file)"
    more = [f"... and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
    head = f"{name}: {len(problems)} of {total} annotations cannot be used:"
    return "\n".join([head, *lines[:MAX_LISTED], *more])


def listing(problems: Sequence[Problem]) -> list[str]:
    """One line per problem, in order; a mistake that more than `MAX_ALIKE` lines have is one line with their count,
    their numbers and what the first of them says."""
    alike: dict[tuple[str, str, str], list[Problem]] = {}
    for problem in problems:
        # Names and numbers differ between lines with the same mistake.
        mistake = re.sub(r"\S*[\d/\\.]\S*", "...", problem.message)
        alike.setdefault((problem.file, problem.code, mistake), []).append(problem)
    files = {name: place for place, name in enumerate(dict.fromkeys(problem.file for problem in problems))}
    lines: list[tuple[int, int, str]] = []
    for group in alike.values():
        first = group[0]
        if len(group) <= MAX_ALIKE:
            lines += [(files[problem.file], problem.line, str(problem)) for problem in group]
            continue
        same = all(problem.message == first.message for problem in group)
        said = first.message if same else f"{first.message}, and so on"
        text = f"{first.file}: {len(group):,} lines ({spans([p.line for p in group])}): {first.code}: {said}"
        lines.append((files[first.file], first.line, text))
    return [text for *_, text in sorted(lines)]


def spans(numbers: Sequence[int], most: int = 8) -> str:
    """Rising numbers in few characters: "1-4, 7, 9-12 and more"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown_runs = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:most]]
    return ", ".join(shown_runs) + (" and more" if len(runs) > most else "")


# --- from bytes to JSON objects


def _lines(path: str | Path, name: str) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1.

    Split at b"\\n" only: `str.splitlines` would cut records at U+2028 and others that are legal inside JSON text.
    """
    descriptor = strictjson.open_regular(path, name, "a JSONL file", "cannot read the annotations")
    try:
        strictjson.refuse_other_formats(os.read(descriptor, strictjson.HEAD_BYTES), name)
        os.lseek(descriptor, 0, os.SEEK_SET)
        with open(descriptor, "rb", closefd=False) as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if line.strip():
                    yield number, line
                while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES + 1)  # the rest of a line that is refused as too long
    except OSError as error:
        raise DataError(f"{name}: cannot read the annotations: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _parse(line: bytes, number: int) -> dict[str, Any]:
    """One line as a JSON object."""
    if len(line) > MAX_LINE_BYTES:
        raise _Refused("line-too-long", f"more than {MAX_LINE_BYTES:,} bytes; is a newline missing?")
    if number > 1 and line.startswith(b"\xef\xbb\xbf"):
        raise _Refused("not-json", "a byte order mark at column 1; were two files joined?")
    try:
        value = strictjson.parse(line)
    except strictjson.NotJSON as error:
        raise _Refused(error.code, str(error)) from error
    if not isinstance(value, dict):
        raise _Refused("not-an-object", f"expected {{...}} with keys, got {_kind(value)}")
    return value


# --- from JSON objects to examples


def _example(line: bytes, number: int, name: str, images: "_ImageRoot", require: Sequence[str]) -> Example:
    record = _parse(line, number)
    named = _images(record)
    _refuse_leftovers(record, KEYS, named)
    _require(record, ("prefix", *require))
    suffix = record.get("suffix")
    if suffix is not None and _text(suffix, "suffix") and not suffix.strip() and "suffix" in require:
        raise _Refused("empty", "'suffix' is blank but not empty; write \"\" where there is nothing to say")
    _refuse_misplaced_boxes(record)
    found = [images.find(image) for image in named]
    return Example(
        id=_id(record.get("id"), number),
        image=found[0] if found else None,
        prefix=_text(record["prefix"], "prefix"),
        suffix=suffix,
        references=_texts(record.get("references"), "references"),
        answers=_texts(record.get("answers"), "answers"),
        file=name,
        line=number,
        more_images=tuple(found[1:]),
        info={key: value for key, value in record.items() if key not in KEYS},
    )


def _refuse_misplaced_boxes(record: dict[str, Any]) -> None:
    """`<loc>` and `<seg>` tokens that are none would be read as letters, in silence."""
    for key in ("prefix", "suffix", "references", "answers"):
        value = record.get(key)
        for text in value if isinstance(value, list) else [value]:
            wrong = locations.problems(text) if isinstance(text, str) else []
            if wrong:
                raise _Refused("bad-location", f"{key!r}: {'; '.join(wrong[:3])}")


def _images(record: dict[str, Any]) -> list[str]:
    """The names of the line's images, in order; none where it is about text alone."""
    if "image" in record and "images" in record:
        raise _Refused("unknown-key", "'image' beside 'images': only one is read; put all of them into 'images'")
    if "image" in record:
        if record["image"] is None:
            raise _Refused("missing-key", "'image' is null; leave the key out where the line is about text alone")
        if isinstance(record["image"], list):
            raise _Refused("wrong-type", "'image' should be text, got a list; several images are 'images'")
        return [_text(record["image"], "image")]
    if "images" not in record:
        return []
    if record["images"] is None:
        raise _Refused("missing-key", "'images' is null; leave the key out where the line is about text alone")
    if record["images"] == []:
        return []
    return list(_texts(record["images"], "images"))


def _labelled(line: bytes, number: int, name: str, images: "_ImageRoot") -> Labelled:
    record = _parse(line, number)
    named = [] if record.get("image") is None else [_text(record["image"], "image")]
    _refuse_leftovers(record, LABELLED_KEYS, named)
    _require(record, ("image", "label"))
    label = _text(record["label"], "label")
    if not label.strip():
        raise _Refused("empty", "'label' is blank; give each image its class")
    return Labelled(_id(record.get("id"), number), images.find(_text(record["image"], "image")), label)


def _require(record: dict[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        if record.get(key) is None:
            what = "null" if key in record else "missing"
            raise _Refused(
                "missing-key", f"{key!r} is {what}; the line has {', '.join(map(repr, record)) or 'no keys'}"
            )


_DIALOGUES = ("conversations", "conversation", "messages", "dialogue", "dialog", "turns")
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_SPEAKS_OF_IMAGES = re.compile(
    r"im(age|g)|pic(ture)?s?($|_)|photo|pixel|screenshot|file_?name|filepath|^(path|file|url)s?$"
)
_IMAGE_NAME = re.compile(r"[^\n]{1,4096}\.(png|jpe?g|webp|gif|bmp|tiff?|avif|heic|heif|jp2|jxl|jfif)", re.IGNORECASE)
_IMAGE_TEXT = re.compile(r"data:image/|iVBORw0KGgo|/9j/4|R0lGOD|UklGR")  # data URLs, and base64 of PNG, JPEG, GIF, WebP


def _refuse_leftovers(record: dict[str, Any], keys: Sequence[str], images: Sequence[str]) -> None:
    """Refuse a key that is not read although it looks like data; the others are somebody's notes.

    `answer` for `answers` would drop what somebody annotated, `image2` what the question is about.
    """
    for key in record:
        if key in keys:
            continue
        resembled = _resembled(key, keys)
        if resembled is not None:
            if resembled in record and resembled != "image":
                raise _Refused(
                    "unknown-key", f"key {key!r} beside {resembled!r} would not be read; {_advice(resembled)}"
                )
            wanted = "images" if resembled == "image" and "image" in record and "images" in keys else resembled
            raise _Refused("unknown-key", f"key {key!r}: did you mean {wanted!r}? Rename it")
        if key.lower() in _DIALOGUES:
            raise _Refused("unknown-key", f"key {key!r}: a dialogue is not read; {strictjson.LLAVA_ADVICE}")
        if key.lower() in _OTHER_MEDIA:
            raise _Refused("unknown-key", f"key {key!r}: only images are read; give frames of it as 'images'")
        if _holds_image(record[key], images):
            wanted = "images" if "images" in keys else "image"
            raise _Refused("unknown-key", f"key {key!r} holds an image that would not be shown; put it into {wanted!r}")
        if not images and "images" in keys and "images" not in record and _SPEAKS_OF_IMAGES.search(key.lower()):
            raise _Refused(
                "unknown-key",
                f"key {key!r}, but no 'image'; rename it, or say `\"images\": []` where the line is about text alone",
            )


def _resembled(key: str, keys: Sequence[str]) -> str | None:
    """The key of ours that `key` spells in another way: other case, a number behind it, a letter more or less."""
    stem = re.sub(r"[\W_\d]+$", "", key).lower()
    if stem in keys:
        return stem if stem != "id" or key.lower() == "id" else None
    close = difflib.get_close_matches(stem, [known for known in keys if known != "id"], n=1, cutoff=0.85)
    return close[0] if close else None


def _advice(key: str) -> str:
    if key in ("image", "images"):
        return "put all images into 'images'"
    if key in ("references", "answers"):
        return f"put all of them into {key!r}"
    return "write a line for each, or rename the key"


def _holds_image(value: Any, images: Sequence[str]) -> bool:
    """Whether a value is (or lists) an image that the line does not show."""
    if isinstance(value, str):
        if _IMAGE_TEXT.match(value) and (value.startswith("data:") or len(value) > 64):
            return True
        is_link = re.match(r"https?://", value) is not None  # where an image came from; nothing is ever fetched
        # The same path from another folder is another name of the image; a/0.png and b/0.png are two.
        same = any(f"/{value}".endswith(f"/{name}") or f"/{name}".endswith(f"/{value}") for name in images)
        return _IMAGE_NAME.fullmatch(value) is not None and not is_link and not same
    if isinstance(value, list):
        return any(_holds_image(item, images) for item in value[:1000])
    if isinstance(value, dict):
        return any(_holds_image(item, images) for item in value.values())
    return False


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise _Refused("wrong-type", f"{key!r} should be text, got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Refused("bad-text", f"{key!r} holds half a surrogate pair at character {error.start + 1}") from error
    return value


def _texts(value: Any, key: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _Refused("wrong-type", f"{key!r} should be a list of text, got {_kind(value)}")
    if not value:
        raise _Refused("empty", f"{key!r} is an empty list; give at least one or leave the key out")
    texts = tuple(_text(item, f"{key}[{index}]") for index, item in enumerate(value))
    if not all(text.strip() for text in texts):
        raise _Refused("empty", f"{key!r} holds a blank text")
    return texts


def _id(value: Any, number: int) -> str:
    if value is None:
        return str(number)
    if type(value) is int:
        return str(value)
    if not _text(value, "id").strip():
        raise _Refused("empty", "'id' is blank; give each line its own or leave the key out")
    return str(value)


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names[type(value)]


class _ImageRoot:
    """Finds image files below one folder, and nothing outside it."""

    def __init__(self, root: str | Path) -> None:
        self.root = os.path.realpath(root)
        if not os.path.isdir(self.root):
            raise DataError(f"image root {shown(root)}: no such folder")
        # Question sets name the same image many times; a path costs several system calls.
        self._found: dict[str, Path | _Refused] = {}

    def find(self, image: str) -> Path:
        """The real path of a regular file. Raises `_Refused`."""
        if image not in self._found:
            try:
                self._found[image] = self._check(image)
            except _Refused as refused:
                self._found[image] = refused
        found = self._found[image]
        if isinstance(found, _Refused):
            raise _Refused(found.code, str(found))  # raised again, `found` would gather a traceback each time
        return found

    def _check(self, image: str) -> Path:
        name = shown(image) if image.strip() else repr(image)
        try:
            real = os.path.realpath(os.path.join(self.root, image))
            # Before any question about the file: what is outside may not even be asked for.
            if os.path.commonpath([self.root, real]) != self.root:
                raise _Refused("outside-root", self._outside(image, name, real))
            mode = os.stat(real).st_mode
        except FileNotFoundError as error:
            if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", image):
                raise _Refused("url", f"image {name}: URLs are not fetched; download it and give its path") from error
            raise _Refused("missing-image", f"image {name} is not below {shown(self.root)}") from error
        except (OSError, ValueError) as error:  # a name too long, a loop of links, a NUL
            raise _Refused("missing-image", f"image {name} cannot be opened: {error}") from error
        if not stat.S_ISREG(mode):
            raise _Refused("not-a-file", f"image {name} is a directory, pipe or device")
        return Path(real)

    def _outside(self, image: str, name: str, real: str) -> str:
        said = f"image {name} lies outside the image root {shown(self.root)}"
        below = os.path.commonpath([self.root, os.path.normpath(os.path.join(self.root, image))]) == self.root
        if not below:
            return f"{said}; give the folder that holds all images as image_root"
        return (
            f"{said}: a symbolic link leads to {shown(real)}; give the folder that holds the images themselves as"
            " image_root (with paths below it), or copy them"
        )
