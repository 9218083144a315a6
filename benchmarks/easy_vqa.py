"""easy-VQA (Victor Zhou, MIT licence): train on its training images only, score on its official test split.

    python benchmarks/easy_vqa.py --data easy_vqa.zip --out runs/easy_vqa                       # from the demo's tower
    python benchmarks/easy_vqa.py --data easy_vqa.zip --out runs/naflex --encoder siglip2_naflex
    python benchmarks/easy_vqa.py --data easy_vqa.zip --out runs/scratch --from-scratch

The archive holds `data/{train,test}/images/N.png` (64x64) and `data/{train,test}/questions.json`, a list of
[question, answer, image id]. The decoder is new in every setting; its tokenizer is trained on the training questions.
No question mentions a position, so flips and quarter turns of the picture keep the answers true.

Prints a table on stderr and one JSON object on stdout. A killed run goes on where it was when started again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zipfile
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GemmaConfig, SiglipVisionConfig

import vlm
from vlm.data.examples import Example
from vlm.errors import DataError
from vlm.eval import evaluate
from vlm.model.parts import encoder_spec
from vlm.text import tokenizer
from vlm.train import DataConfig, ModelConfig, RunConfig, StageConfig, run

DECODER = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # 1 / sqrt(width): the default of 0.02 is made for widths of thousands
}
AUGMENT = ["rotate90", "hflip"]
NAFLEX_PATCHES = 36
"""Patch budget of the NaFlex tower: as many as the fixed-size tower has, so that the two compare."""


def prepare(archive: Path, folder: Path) -> None:
    """Unpack the archive into `train.jsonl`, `test.jsonl` and their images; done once.

    Raises:
        DataError: the archive is not easy-VQA.
    """
    if (folder / "test.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive) as opened:
        names = set(opened.namelist())
        for split in ("train", "test"):
            listing = f"data/{split}/questions.json"
            if listing not in names:
                raise DataError(f"{archive}: no {listing}; expected the easy-VQA archive")
            questions = json.loads(opened.read(listing))
            (folder / split).mkdir(exist_ok=True)
            for image in sorted({image for _, _, image in questions}):
                pixels = opened.read(f"data/{split}/images/{image}.png")
                (folder / split / f"{image}.png").write_bytes(pixels)
            lines = [json.dumps(record(split, i, *question)) for i, question in enumerate(questions)]
            (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def record(split: str, index: int, question: str, answer: str, image: int) -> dict[str, Any]:
    """One line of a JSONL file."""
    return {
        "id": f"{split}-{index}",
        "image": f"{split}/{image}.png",
        "prefix": f"answer en {question}",
        "suffix": answer,
        "references": [answer],
    }


def start_model(folder: Path, train: Path, tower: Path, encoder: str, from_scratch: bool) -> Path:
    """The untrained model: the given tower (or a new one of the same shape) and a new decoder."""
    target = folder / "start"
    if (target / "config.json").exists():
        return target
    words = tokenizer.build(corpus(train), vocab_size=420)
    image = {"max_num_patches": NAFLEX_PATCHES} if encoder == "siglip2_naflex" else None
    parts = ("linear", GemmaConfig(**DECODER), words)
    if from_scratch:
        model, processor = vlm.new(new_tower(tower, encoder), *parts, image=image)
    else:
        model, processor = vlm.new(tower, *parts, encoder_kind=encoder, image=image)
    return vlm.save(model, processor, target)


def new_tower(tower: Path, encoder: str) -> Any:
    """A vision configuration of the same shape, for random weights."""
    shape = AutoConfig.from_pretrained(tower).vision_config
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    settings: dict[str, Any] = {key: getattr(shape, key) for key in keys}
    if encoder == "siglip":
        return SiglipVisionConfig(**settings, image_size=shape.image_size, vision_use_head=False)
    patches = (shape.image_size // shape.patch_size) ** 2
    return encoder_spec(encoder).config(**settings, num_patches=patches, vision_use_head=False)


def corpus(train: Path) -> list[str]:
    """The training texts."""
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    return [text for row in rows for text in (row["prefix"], row["suffix"])]


def stages(args: argparse.Namespace) -> list[StageConfig]:
    """A short frozen-encoder stage (pointless for a tower that knows nothing), then everything."""
    common: dict[str, Any] = {
        "batch_size": args.batch_size,
        "weight_decay": 0.02,
        "betas": (0.9, 0.98),
        "schedule": "cosine",
        "warmup": 0.05,
        "augment": AUGMENT,
    }
    rate = args.learning_rate
    full = {"encoder": rate if args.from_scratch else rate / 2, "projector": rate, "decoder": rate}
    tune = StageConfig(name="tune", module="full", train=full, steps=args.steps, **common)
    if args.from_scratch:
        return [tune]
    align = {"projector": rate, "decoder": rate}
    return [StageConfig(name="align", module="frozen_encoder", train=align, steps=args.align_steps, **common), tune]


def answer_kind(example: Example) -> str:
    """Kind of a question, by its answer."""
    if example.suffix in ("yes", "no"):
        return "yes/no"
    return "shape" if example.suffix in ("circle", "rectangle", "triangle") else "colour"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="easy_vqa.zip")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder", choices=("siglip", "siglip2_naflex"), default="siglip")
    parser.add_argument("--tower", type=Path, help="a SigLIP checkpoint to start from instead of the demo's")
    parser.add_argument("--from-scratch", action="store_true", help="a new tower instead of the demo's")
    parser.add_argument("--align-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--limit", type=int, help="score only the first so many test questions")
    args = parser.parse_args()
    began = time.monotonic()
    data = args.out / "data"
    prepare(args.data, data)
    with as_file(files("vlm.demo") / "assets" / "siglip") as shipped:
        tower = args.tower or shipped
        start = start_model(args.out, data / "train.jsonl", tower, args.encoder, args.from_scratch)
    train = args.out / "train"
    config = RunConfig(
        out=train,
        model=ModelConfig(path=start),
        data=DataConfig(train=data / "train.jsonl"),
        stages=stages(args),
        log_every=50,
        checkpoint_every=250,
    )
    model = run(config, resume=(train / "config.yaml").exists())
    trained = time.monotonic() - began
    outcome = evaluate(
        model,
        data / "test.jsonl",
        "exact_match",
        args.out / "eval",
        batch_size=128,
        max_new_tokens=6,
        limit=args.limit,
        kind_of=answer_kind,
    )
    result = {
        "encoder": args.encoder,
        "start": "scratch" if args.from_scratch else str(args.tower or "demo tower"),
        "accuracy": outcome["metrics"]["exact_match"]["value"],
        "interval_95": outcome["metrics"]["exact_match"]["interval_95"],
        "num_questions": outcome["num_items"],
        "by_answer": {kind: group["mean"] for kind, group in outcome["by_kind"]["exact_match"].items()},
        "steps": sum(stage.steps or 0 for stage in config.stages),
        "batch_size": args.batch_size,
        "train_minutes": round(trained / 60, 1),
        "total_minutes": round((time.monotonic() - began) / 60, 1),
    }
    for key, value in result.items():
        print(f"{key:15} {value}", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
