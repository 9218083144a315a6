"""AI2D: `questions/{image}.json`, `annotations/{image}.json`, and the list of test images.

A question file is `{"imageName": "1.png", "questions": {"QUESTION": {"questionId", "answerTexts", "correctAnswer"
(index), "abcLabel"}}}`; an annotation file holds `{"text": {"T0": {"rectangle": [[x1, y1], [x2, y2]],
"replacementText": "A", ...}}}`; `ai2d_test_ids.csv` is one image number per line (ai2d-all.zip of AllenAI; big_vision
`datasets/ai2d`).

Questions with `abcLabel` ask about letters that have to be written over the labels of the diagram. Such images are
drawn once, in Pillow's own font, into the folder `lettered` (big_vision uses another font: pixels differ, letters do
not).

Files: `questions`, `annotations`, `test_ids`, and the folders `images` and `lettered`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.data.benchmarks.contract import Benchmark
from vlm.data.items import Item, choice_fields
from vlm.data.rows import Row
from vlm.data.source import Folder, Source, read_object
from vlm.errors import DataError, ImageError
from vlm.files import publishing_file

if TYPE_CHECKING:
    from PIL import Image

_LARGEST = 100  # points; shrunk until the letter fits its rectangle

FORMAT = Benchmark(about="AI2D's folders of questions and annotations, and the list of test images")


def read(source: Source) -> Iterator[Item]:
    listed = source.text("test_ids").split()
    folder, name = source.path("questions"), source.files["questions"].path
    for image in sorted(listed, key=lambda number: (len(number), number)):
        path = folder / f"{image}.png.json"
        if not path.exists():
            raise DataError(f"{path} is missing, though the test list names image {image}; unpack ai2d-all.zip again")
        content = read_object(path, f"{name}/{path.name}")
        questions = content.row("questions")
        for question in questions.values:
            yield _item(source, content.text("imageName"), question, questions.row(question))


def _item(source: Source, image: str, question: str, row: Row) -> Item:
    choices = row.texts("answerTexts")
    right = row.index("correctAnswer", len(choices))
    lettered = row.flag("abcLabel")
    return Item(
        id=row.key("questionId"),
        images=(_lettered(source, image) if lettered else source.images() / image,),
        fields={"question": question, **choice_fields(choices)},
        answers=(choices[right],),
        info={"choices": choices, "answer_index": right, "lettered": lettered},
    )


def _lettered(source: Source, image: str) -> Path:
    """The diagram with letters over its labels, drawn if it is not there yet."""
    target = source.images("lettered") / image
    plain = source.images() / image
    if target.exists() or not plain.exists():
        return target
    import PIL.Image  # scoring does without

    from vlm.images.load import load_image

    path = Folder(source.path("annotations")) / f"{image}.json"
    texts = read_object(path, path.name).row("text")
    try:
        drawn = load_image(plain)
    except ImageError:
        return plain  # the harness meets the same error and counts the item as wrong
    for label in texts.values:
        draw_letter(drawn, texts.row(label))
    target.parent.mkdir(parents=True, exist_ok=True)
    with publishing_file(target) as partial:  # a process beside this one, or after a kill, sees all of it or none
        drawn.save(partial, PIL.Image.registered_extensions().get(target.suffix.lower(), "PNG"))
    return target


def draw_letter(image: Image.Image, label: Row) -> None:
    """Write `replacementText` over `rectangle`, black on white and as large as fits."""
    from PIL import ImageDraw, ImageFont

    x1, y1, x2, y2 = _corners(label)
    draw = ImageDraw.Draw(image)
    left, right = sorted((x1, x2))
    top, bottom = sorted((y1, y2))
    draw.rectangle((left, top, right, bottom), fill="white")
    text = label.text("replacementText")
    for size in range(_LARGEST, 0, -1):
        font = ImageFont.load_default(size)
        _, _, width, height = font.getbbox(text)
        if width <= right - left and height <= bottom - top:
            break
    draw.text((left + (right - left - width) // 2, top), text, fill="black", font=font)


def _corners(label: Row) -> tuple[float, ...]:
    rectangle = label["rectangle"]
    if not isinstance(rectangle, list) or not all(isinstance(corner, list) for corner in rectangle):
        raise DataError(f"{label.where}: 'rectangle' should be two corners, got {rectangle!r}")
    return Row({"rectangle": [value for corner in rectangle for value in corner]}, label).box("rectangle")
