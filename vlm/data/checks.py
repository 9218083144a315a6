"""The checks of one annotation: nothing that was meant for the model may be lost in silence.

A record is an object with the keys of `vlm.data.reading`, whatever file it comes from; what cannot be used is `Refused`
with a short code.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.data import strictjson
from vlm.data.examples import Example, Labelled, Paired
from vlm.data.problems import Refused
from vlm.errors import DataError
from vlm.text import locations
from vlm.words import shown

KEYS = ("id", "image", "images", "prefix", "suffix", "references", "answers")
LABELLED_KEYS = ("id", "image", "label")
TEXT_KEYS = ("text", "texts", "caption", "captions", "references", "suffix")
"""Any one of them holds the texts of an image, for retrieval."""


def example(record: dict[str, Any], number: int, name: str, images: ImageRoot, require: Sequence[str]) -> Example:
    """An example from a record that passes every check. Raises Refused."""
    named = named_images(record)
    _refuse_leftovers(record, KEYS, named)
    _require(record, ("prefix", *require))
    suffix = record.get("suffix")
    if suffix is not None and checked_text(suffix, "suffix") and not suffix.strip() and "suffix" in require:
        raise Refused("empty", "'suffix' is blank but not empty; write \"\" where there is nothing to say")
    _refuse_misplaced_boxes(record)
    found = [images.find(image) for image in named]
    return Example(
        id=record_id(record.get("id"), number),
        image=found[0] if found else None,
        prefix=checked_text(record["prefix"], "prefix"),
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
                raise Refused("bad-location", f"{key!r}: {'; '.join(wrong[:3])}")


def named_images(record: dict[str, Any]) -> list[str]:
    """The names of the line's images, in order; none where it is about text alone."""
    if "image" in record and "images" in record:
        raise Refused("unknown-key", "'image' beside 'images': only one is read; put all of them into 'images'")
    if "image" in record:
        if record["image"] is None:
            raise Refused("missing-key", "'image' is null; leave the key out where the line is about text alone")
        if isinstance(record["image"], list):
            raise Refused("wrong-type", "'image' should be text, got a list; several images are 'images'")
        return [checked_text(record["image"], "image")]
    if "images" not in record:
        return []
    if record["images"] is None:
        raise Refused("missing-key", "'images' is null; leave the key out where the line is about text alone")
    if record["images"] == []:
        return []
    return list(_texts(record["images"], "images"))


def labelled(record: dict[str, Any], number: int, name: str, images: ImageRoot) -> Labelled:
    """An image with its class. Raises Refused."""
    named = [] if record.get("image") is None else [checked_text(record["image"], "image")]
    _refuse_leftovers(record, LABELLED_KEYS, named)
    _require(record, ("image", "label"))
    label = checked_text(record["label"], "label")
    if not label.strip():
        raise Refused("empty", "'label' is blank; give each image its class")
    return Labelled(record_id(record.get("id"), number), images.find(checked_text(record["image"], "image")), label)


def paired(record: dict[str, Any], number: int, name: str, images: ImageRoot) -> Paired:
    """An image with the texts that belong to it. Raises Refused."""
    named = [] if record.get("image") is None else [checked_text(record["image"], "image")]
    _refuse_leftovers(record, ("id", "image", "language", "prefix", "answers", *TEXT_KEYS), named)
    _require(record, ("image",))
    given = [key for key in TEXT_KEYS if record.get(key) not in (None, [])]
    if not given:
        raise Refused("missing-key", f"no text belongs to the image; give it as one of {', '.join(TEXT_KEYS)}")
    if len(given) > 1:
        raise Refused("unknown-key", f"{' and '.join(map(repr, given))}: only one is read; put all texts into one")
    value = record[given[0]]
    texts = tuple(_texts(value, given[0])) if isinstance(value, list) else (checked_text(value, given[0]),)
    if not all(text.strip() for text in texts):
        raise Refused("empty", f"{given[0]!r} holds a text that is blank")
    language = "" if record.get("language") is None else checked_text(record["language"], "language")
    found = images.find(checked_text(record["image"], "image"))
    return Paired(record_id(record.get("id"), number), found, texts, language)


def _require(record: dict[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        if record.get(key) is None:
            what = "null" if key in record else "missing"
            raise Refused("missing-key", f"{key!r} is {what}; the line has {', '.join(map(repr, record)) or 'no keys'}")


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
                raise Refused(
                    "unknown-key", f"key {key!r} beside {resembled!r} would not be read; {_advice(resembled)}"
                )
            wanted = "images" if resembled == "image" and "image" in record and "images" in keys else resembled
            raise Refused("unknown-key", f"key {key!r}: did you mean {wanted!r}? Rename it")
        if key.lower() in _DIALOGUES:
            raise Refused("unknown-key", f"key {key!r}: a dialogue is not read; {strictjson.LLAVA_ADVICE}")
        if key.lower() in _OTHER_MEDIA:
            raise Refused("unknown-key", f"key {key!r}: only images are read; give frames of it as 'images'")
        if _holds_image(record[key], images):
            wanted = "images" if "images" in keys else "image"
            raise Refused("unknown-key", f"key {key!r} holds an image that would not be shown; put it into {wanted!r}")
        if not images and "images" in keys and "images" not in record and _SPEAKS_OF_IMAGES.search(key.lower()):
            raise Refused(
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


def checked_text(value: Any, key: str) -> str:
    """The text that a key holds. Raises Refused."""
    if not isinstance(value, str):
        raise Refused("wrong-type", f"{key!r} should be text, got {strictjson.kind_of(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Refused("bad-text", f"{key!r} holds half a surrogate pair at character {error.start + 1}") from error
    return value


def _texts(value: Any, key: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise Refused("wrong-type", f"{key!r} should be a list of text, got {strictjson.kind_of(value)}")
    if not value:
        raise Refused("empty", f"{key!r} is an empty list; give at least one or leave the key out")
    texts = tuple(checked_text(item, f"{key}[{index}]") for index, item in enumerate(value))
    if not all(text.strip() for text in texts):
        raise Refused("empty", f"{key!r} holds a blank text")
    return texts


def record_id(value: Any, default: object) -> str:
    """The id of a record: its own, text or a whole number, or the default where it has none. Raises Refused."""
    if value is None:
        return str(default)
    if type(value) is int:
        return str(value)
    if not checked_text(value, "id").strip():
        raise Refused("empty", "'id' is blank; give each line its own or leave the key out")
    return str(value)


class ImageRoot:
    """Finds image files below one folder, and nothing outside it."""

    def __init__(self, root: str | Path) -> None:
        self.root = os.path.realpath(root)
        if not os.path.isdir(self.root):
            raise DataError(f"image root {shown(root)}: no such folder")
        # Question sets name the same image many times; a path costs several system calls.
        self._found: dict[str, Path | Refused] = {}

    def find(self, image: str) -> Path:
        """The real path of a regular file. Raises `Refused`."""
        if image not in self._found:
            try:
                self._found[image] = self._check(image)
            except Refused as refused:
                self._found[image] = refused
        found = self._found[image]
        if isinstance(found, Refused):
            raise Refused(found.code, str(found))  # raised again, `found` would gather a traceback each time
        return found

    def _check(self, image: str) -> Path:
        name = shown(image) if image.strip() else repr(image)
        try:
            real = os.path.realpath(os.path.join(self.root, image))
            # Before any question about the file: what is outside may not even be asked for.
            if os.path.commonpath([self.root, real]) != self.root:
                raise Refused("outside-root", self._outside(image, name, real))
            mode = os.stat(real).st_mode
        except FileNotFoundError as error:
            if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", image):
                raise Refused("url", f"image {name}: URLs are not fetched; download it and give its path") from error
            raise Refused("missing-image", f"image {name} is not below {shown(self.root)}") from error
        except (OSError, ValueError) as error:  # a name too long, a loop of links, a NUL
            raise Refused("missing-image", f"image {name} cannot be opened: {error}") from error
        if not stat.S_ISREG(mode):
            raise Refused("not-a-file", f"image {name} is a directory, pipe or device")
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
