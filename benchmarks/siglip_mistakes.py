"""What common mistakes with SigLIP cost, each made on purpose on the package's small SigLIP and its drawn scenes.

    vlm demo --task search --out scenes
    python benchmarks/siglip_mistakes.py scenes

Texts and pictures read wrongly: the mean cosine of the 1,416 captions (300 pictures) with what they should be, how
often the nearest of 40 names ("a red star") is right, how often that of three numbers is ("two shapes"), and how often
the first picture fits a caption. Scores read wrongly: what the probabilities say, and the order. The wrong ways go past
this library, to transformers' model itself. The table goes to stderr, JSON to stdout.

The model is of SigLIP 2's family, 32 positions. How large an effect is depends on the model; whether there is one does
not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from vlm import siglip
from vlm.demo import album, captions, scenes
from vlm.images import load_image
from vlm.siglip.search.exact import top
from vlm.words import columns

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TextWay = Callable[[Sequence[str]], Tensor]


class Album(NamedTuple):
    """The drawn scenes, and what is true of them.

    Attributes:
        pictures: RGB. texts: captions. fits: bool[pictures, texts].
        alone: numbers of the pictures with one thing. names, which: the 40 names, and the right one of each of those.
        numbers: how many things each picture holds, less one.
    """

    pictures: list[Image.Image]
    texts: list[str]
    fits: Tensor
    alone: list[int]
    names: list[str]
    which: Tensor
    numbers: Tensor


def read(folder: Path, seed: int) -> Album:
    """What `vlm demo --task search` has drawn."""
    lines = [json.loads(line) for line in (folder / "scenes.jsonl").read_text(encoding="utf-8").splitlines()]
    seen = album.all_scenes(seed, len(lines))
    texts = [text for line in lines for text in line["captions"]]
    fits = torch.tensor([[captions.check(scene, text).true for text in texts] for scene in seen])
    names = [f"a {' '.join(pair)}" for pair in scenes.PAIRS]
    alone = [number for number, scene in enumerate(seen) if len(scene.things) == 1]
    which = torch.tensor([names.index(f"a {seen[number].things[0].name}") for number in alone])
    numbers = torch.tensor([len(scene.things) - 1 for scene in seen])
    return Album([load_image(folder / line["image"]) for line in lines], texts, fits, alone, names, which, numbers)


class Ways:
    """Texts to vectors float32[N, D] of length 1: rightly, and as they are read by mistake."""

    def __init__(self, model: siglip.DualTower, processor: siglip.DualProcessor) -> None:
        self.model, self.processor = model, processor
        self.tokenizer: Any = processor.tokenizer

    def right(self, texts: Sequence[str]) -> Tensor:
        """By the rule of the family."""
        return siglip.encode_texts(self.model, self.processor, texts).vectors

    def by_hand(
        self,
        texts: Sequence[str],
        *,
        padding: str = "max_length",
        side: str = "right",
        mask: bool = False,
        pad: int | None = None,
        bos: bool = False,
        end_token: bool = False,
    ) -> Tensor:
        """By transformers' tokenizer and model: the right way with these arguments, a mistake with any other."""
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        start = [self.tokenizer.bos_token_id] * bos
        room = self.processor.context - len(start) - 1
        ids = [[*start, *row[:room], self.tokenizer.eos_token_id] for row in ids]
        length = self.processor.context if padding == "max_length" else max(map(len, ids))
        fill = self.tokenizer.pad_token_id if pad is None else pad
        rows, seen = [], []
        for row in ids:
            blank = [fill] * (length - len(row))
            rows.append([*row, *blank] if side == "right" else [*blank, *row])
            seen.append([int(place != fill) for place in rows[-1]])
        given = {"input_ids": torch.tensor(rows)} | ({"attention_mask": torch.tensor(seen)} if mask else {})
        with torch.no_grad():
            text_model = self.model.model.text_model
            if not end_token:
                return normalize(text_model(**given).pooler_output, dim=-1)
            hidden = text_model(**given).last_hidden_state
            last = torch.tensor([len(row) - 1 for row in ids])
            return normalize(text_model.head(hidden[torch.arange(len(ids)), last]), dim=-1)


def text_ways(ways: Ways) -> dict[str, TextWay]:
    """Name of the mistake -> texts as it reads them."""
    eos = ways.tokenizer.eos_token_id
    return {
        "as it should be": ways.by_hand,
        "Title Case, not lower-cased": lambda texts: ways.by_hand([text.title() for text in texts]),
        "UPPER CASE, not lower-cased": lambda texts: ways.by_hand([text.upper() for text in texts]),
        "padded to the longest text": lambda texts: ways.by_hand(texts, padding="longest"),
        "each text alone, not padded": lambda texts: torch.cat([ways.by_hand([t], padding="longest") for t in texts]),
        "attention mask given": lambda texts: ways.by_hand(texts, mask=True),
        "padded on the left": lambda texts: ways.by_hand(texts, side="left"),
        "left, with a mask": lambda texts: ways.by_hand(texts, side="left", mask=True),
        "padded with </s>, as SigLIP 1": lambda texts: ways.by_hand(texts, pad=eos),
        "a <bos> in front": lambda texts: ways.by_hand(texts, bos=True),
        "read at the end token, as CLIP": lambda texts: ways.by_hand(texts, end_token=True),
        "punctuation dropped": lambda texts: ways.by_hand([siglip.canonicalize(text) for text in texts]),
    }


def image_ways(model: siglip.DualTower, pixels: Tensor) -> dict[str, Tensor]:
    """Name of the mistake -> vectors of the pictures, float32[N, D]. `pixels` are the right ones, -1 to 1."""
    unit = pixels / 2 + 0.5
    clip = (unit - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    given = {
        "pixels from 0 to 1": unit,
        "pixels from 0 to 255": unit * 255,
        "CLIP's mean and deviation": clip,
        "blue and red exchanged (OpenCV)": pixels.flip(1),
    }
    with torch.no_grad():
        return {name: model.encode_image(values) for name, values in given.items()}


def quality(found: Album, images: Tensor, embed: TextWay) -> dict[str, float]:
    """Shares of right answers."""
    names, numbers = embed(found.names), embed(album.NUMBERS)
    first = (images @ embed(found.texts).T).argmax(0)
    return {
        "names": _share((images[found.alone] @ names.T).argmax(1) == found.which),
        "numbers": _share((images @ numbers.T).argmax(1) == found.numbers),
        "search": _share(found.fits[first, torch.arange(len(first))]),
    }


def readings(found: Album, model: siglip.DualTower, ways: Ways, images: Tensor) -> list[dict[str, Any]]:
    """One row for each mistake in reading texts or pictures."""
    right, rows = ways.right(found.texts), []
    for name, embed in text_ways(ways).items():
        cosine = (embed(found.texts) * right).sum(1)
        rows.append({"mistake": name, "cosine": cosine.mean().item(), "least": cosine.min().item()})
        rows[-1] |= quality(found, images, embed)
    pixels = ways.processor.images(found.pictures)["pixel_values"]
    for name, wrong in image_ways(model, pixels).items():
        cosine = (wrong * images).sum(1)
        rows.append({"mistake": name, "cosine": cosine.mean().item(), "least": cosine.min().item()})
        rows[-1] |= quality(found, wrong, ways.right)
    return rows


def scores(found: Album, model: siglip.DualTower, ways: Ways, images: Tensor) -> dict[str, float]:
    """What the probabilities of 100 pictures and 40 names become, one of which is right."""
    with torch.no_grad():
        logits = model.logits(images[found.alone], ways.right(found.names))
    true = torch.zeros_like(logits).bool()
    true[torch.arange(len(true)), found.which] = True
    bias = 0.0 if model.bias is None else model.bias.item()
    right, forgotten = logits.sigmoid(), (logits - bias).sigmoid()
    absent = logits.masked_fill(true, -torch.inf)  # the same question without the right name among the labels
    return {
        "scale": model.scale.item(),
        "bias": bias,
        "wrong names above 0.5": (right[~true] > 0.5).double().mean().item(),
        "wrong names above 0.5, bias forgotten": (forgotten[~true] > 0.5).double().mean().item(),
        "mean probability of a wrong name": right[~true].mean().item(),
        "mean probability of a wrong name, bias forgotten": forgotten[~true].mean().item(),
        "right name not asked: highest probability of the others": absent.sigmoid().amax(1).mean().item(),
        "right name not asked: highest softmax of the others": absent.softmax(1).amax(1).mean().item(),
    }


def products(found: Album, model: siglip.DualTower, ways: Ways) -> dict[str, float]:
    """What inner products of vectors that are not of length 1 become. Only the candidates' lengths change an order."""
    texts = ways.processor.texts(found.texts).input_ids
    with torch.no_grad():
        image = model.encode_image(**ways.processor.images(found.pictures), normalize=False)
        text = model.encode_text(texts, normalize=False)
    told = {}
    for name, a, b in (("", normalize(image), normalize(text)), (", not normalised", image, text)):
        product = a @ b.T
        searched, named = product.argmax(0), product.argmax(1)
        told[f"largest product{name}"] = product.max().item()
        told[f"first picture fits the text{name}"] = _share(found.fits[searched, torch.arange(len(searched))])
        told[f"first text fits the picture{name}"] = _share(found.fits[torch.arange(len(named)), named])
    for name, vectors in (("picture", image), ("text", text)):
        lengths = vectors.norm(dim=1)
        told[f"longest {name} vector over the shortest"] = (lengths.max() / lengths.min()).item()
    return told


def _share(right: Tensor) -> float:
    return right.double().mean().item()


def missing(images: Tensor) -> dict[str, list[int]]:
    """Five results are asked of three vectors."""
    found = {"exact search": top([images[:3]], images[:1], 5).rows[0].tolist()}
    try:
        import faiss
    except ImportError:  # an extra
        return found
    index = faiss.IndexFlatIP(images.shape[1])
    index.add(images[:3].numpy())
    found["IndexFlatIP"] = index.search(images[:1].numpy(), 5)[1][0].tolist()
    return found


def main() -> None:
    """Print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", type=Path, help="folder that `vlm demo --task search` has written")
    parser.add_argument("--seed", type=int, default=0, help="of that demo (0)")
    options = parser.parse_args()
    model, processor = siglip.load("demo-siglip", dtype=torch.float32)
    found, ways = read(options.scenes, options.seed), Ways(model, processor)
    given = [(str(number), picture) for number, picture in enumerate(found.pictures)]
    images = torch.cat([batch.vectors for batch in siglip.encode_images(model, processor, given)])
    rows = readings(found, model, ways, images)
    table = [["mistake", "cosine (least)", "names", "numbers", "search"]]
    for row in rows:
        shares = [f"{row[name]:.1%}" for name in ("names", "numbers", "search")]
        table.append([row["mistake"], f"{row['cosine']:.3f} ({row['least']:.3f})", *shares])
    told = scores(found, model, ways, images) | products(found, model, ways)
    empty = missing(images)
    lines = [columns(table), "", *(f"{value:10.4f}  {name}" for name, value in told.items())]
    lines += [f"{rows}  rows of 3 vectors for k = 5, {name}" for name, rows in empty.items()]
    print("\n".join(lines), file=sys.stderr)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"versions": versions, "readings": rows, "scores": told, "rows": empty}, indent=1))


if __name__ == "__main__":
    main()
