"""Speed of the caption tokenizer, and of all caption metrics, on ordinary captions.

    python benchmarks/caption_tokenizer.py [--captions 20000]

The captions are new ones: beginnings and ends of the COCO captions in `tests/data/metrics`, put together so that none
occurs twice, because texts that were seen are remembered. CPU time of one core; the table goes to stderr, JSON to
stdout.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

from vlm.eval import metrics

SOURCE = Path(__file__).parent.parent / "tests" / "data" / "metrics" / "caption_coco80_vinvl.json"
METRICS = ("bleu_4", "rouge_l", "cider")
REFERENCES = 5


def captions(count: int, seed: int) -> list[str]:
    """So many different captions, made of halves of real ones."""
    items = json.loads(SOURCE.read_text(encoding="utf-8"))["items"]
    words = [text.split() for item in items for text in (item["hyp"], *item["refs"])]
    source, found = random.Random(seed), dict[str, None]()
    while len(found) < count:
        first, second = source.choice(words), source.choice(words)
        found[" ".join(first[: len(first) // 2] + second[len(second) // 2 :])] = None
    return list(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=20_000, help="different captions to tokenise (20000)")
    parser.add_argument("--images", type=int, default=5_000, help="images, with 5 references each, to score (5000)")
    options = parser.parse_args()
    metrics.tokenize("the rules are compiled by the first call")
    row: dict[str, float] = {}
    new = captions(options.captions, 1)
    start = time.process_time()
    for text in new:
        metrics.tokenize(text)
    row["captions_per_second"] = len(new) / (time.process_time() - start)
    texts = captions(options.images * (REFERENCES + 1), 2)
    said = {str(i): texts[i] for i in range(options.images)}
    gold = {
        str(i): tuple(texts[options.images + i * REFERENCES : options.images + (i + 1) * REFERENCES])
        for i in range(options.images)
    }
    for name in METRICS:
        start = time.process_time()
        metrics.compute(name, said, gold)
        row[f"{name}_seconds"] = time.process_time() - start
    for name, value in row.items():
        print(f"{name:22} {value:12,.2f}", file=sys.stderr)
    print(json.dumps({"options": vars(options), **row}))


if __name__ == "__main__":
    main()
