"""Draw the README's picture: held-out scenes of a finished demo with what its model says of them.

python docs/make_picture.py demo docs/images/demo.png
"""

import json
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import vlm

SHOWN = 5
COLUMN, SIDE, HEIGHT, MARGIN = 275, 193, 450, 5
"""Pixels: width of a column, side of its picture, height of the whole."""


def main(folder: Path, target: Path) -> None:
    model, processor = vlm.load(folder / "model")
    lines = (folder / "data" / "test_questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions: dict[str, list[dict]] = {}
    for line in map(json.loads, lines):
        questions.setdefault(line["image"], []).append(line)
    images = sorted(questions)[3 : 3 + SHOWN]
    pictures = [Image.open(folder / "data" / name).convert("RGB") for name in images]
    captions = vlm.generate(model, processor, pictures, ["caption en"] * SHOWN)
    sheet = Image.new("RGB", (COLUMN * SHOWN, HEIGHT), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, (name, picture, caption) in enumerate(zip(images, pictures, captions, strict=True)):
        asked = questions[name][:3]
        answers = vlm.generate(model, processor, [picture] * len(asked), [item["prefix"] for item in asked])
        text = textwrap.fill(caption, 30)
        for item, answer in zip(asked, answers, strict=True):
            question = item["prefix"].removeprefix("answer en ")
            right = "" if answer == item["suffix"] else f"  (wrong: {item['suffix']})"
            text += "\n\n" + textwrap.fill(question, 30) + f"\n    {answer}{right}"
        left = COLUMN * column + (COLUMN - SIDE) // 2
        sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, MARGIN))
        draw.multiline_text((left, SIDE + 3 * MARGIN), text, fill="#222222", font=font)
    sheet.save(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
