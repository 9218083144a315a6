"""`vlm demo --task search`: SigLIP's own uses on a folder of drawn scenes, with what is right known for every text.

OUT/images, OUT/scenes.jsonl ...   the collection (`vlm.demo.album`)
OUT/vectors/     what `vlm embed OUT/images` writes
OUT/search.json  the figures, and what each search found; written last
OUT/report.html
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm import files
from vlm.checkpoints.places import DEMO_SIGLIP
from vlm.data.collection import entries_of, gathered
from vlm.data.problems import listing
from vlm.demo import album, dataset, figures, search_page
from vlm.demo.figures import Read
from vlm.demo.queries import Query, Said, truth
from vlm.demo.recipe import claim
from vlm.demo.scenes import Scene
from vlm.errors import DataError
from vlm.model.dual import DualTower
from vlm.siglip import embedding, space
from vlm.siglip.encode import encode_texts
from vlm.siglip.loading import load
from vlm.siglip.processor import DualProcessor
from vlm.siglip.store import VectorStore
from vlm.siglip.writing import VectorWriter
from vlm.words import aligned

log = logging.getLogger("vlm")

BATCH = 32
FOUND = 6
"""Pictures of each search that are kept and shown."""
SEARCHES = (
    Query(album.SOUGHT, (Said(None, "red", "star"), Said(None, "blue", "circle")), "above"),
    Query("a green cross", (Said(None, "green", "cross"),)),
    Query("yellow", (Said(colour="yellow"),)),
    Query("a photo of a small triangle", (Said("small", None, "triangle"),)),
    Query("a circle at the top left", (Said(shape="circle", place="top left"),)),
    Query("a star to the left of a cross", (Said(shape="star"), Said(shape="cross")), "left of"),
    Query("two rectangles", number=2, counted=Said(shape="rectangle")),
    Query("three shapes", number=3),
)
"""With what they say, so that every picture found is known to be right or wrong."""


def main(out: str | Path, *, seed: int = 0, count: int = album.SCENES, model: str = DEMO_SIGLIP) -> dict[str, Any]:
    """Draw the scenes into `out`, embed them, ask for labels and searches, and print the figures; what is there is
    kept.

    Args:
        count: of scenes; fewer make a quick test.
        model: a checkpoint with both towers.

    Returns:
        what `out/search.json` holds.

    Raises:
        ConfigError: `out` holds a demo with other settings, or `out/vectors` those of another model.
        DataError: a picture is damaged.
    """
    out, started = Path(out), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    claim(out, {"task": "search", "seed": seed, "scenes": count, "model": model})
    facts: dict[str, Any] | None = dataset.left_over(out / "search.json")
    if facts is None or not album.whole(out, seed, count) or not (out / "report.html").exists():
        log.info("drawing %d scenes", count)
        album.write(out, seed, count)
        facts = look(out, seed, count, model)
        facts["seconds"] = round(time.monotonic() - started, 1)
        search_page.write(out, facts)
        files.write_json(out / "search.json", facts)
    print(table(facts))
    print(f"\nreport  {out / 'report.html'}")
    return facts


def look(out: Path, seed: int, count: int, model: str) -> dict[str, Any]:
    """Embed every picture once; all else is asked of the vectors."""
    tower, processor = load(model, dtype="auto")
    store = embed(out, model, tower, processor)
    vectors = torch.cat(store.shards)
    by_id = {line["id"]: line for line in dataset.read_lines(out / "scenes.jsonl")}
    lines = [by_id[name] for name in store.ids]

    @torch.no_grad()
    def read(texts: Sequence[str]) -> Tensor:
        return tower.logits(vectors, encode_texts(tower, processor, texts).vectors)

    log.info("asking")
    seen = album.all_scenes(seed, count)
    captions = [(number, text) for number, line in enumerate(lines) for text in line["captions"]]
    asked = figures.all_figures(seen, captions, read)
    found = searches(seen, [line["image"] for line in lines], read)
    return {"seed": seed, "model": model, "figures": [asdict(figure) for figure in asked], "searches": found}


def embed(out: Path, model: str, tower: DualTower, processor: DualProcessor) -> VectorStore:
    """`vlm embed OUT/scenes.jsonl --out OUT/vectors`."""
    source = [str(out / "scenes.jsonl")]
    entries, problems = gathered(entries_of(source))
    with VectorWriter(out / "vectors", space.of(tower, processor), "images", model=model) as writer:
        work = embedding.plan(entries, source, writer)
        log.info("embedding %d pictures", work.count)
        encode = embedding.of_images(tower, processor, batch_size=BATCH)
        summary = embedding.carry_out(work, problems, writer, encode, prune=True)
    if summary.problems:
        raise DataError("\n".join(listing(summary.problems)))
    return VectorStore.open(out / "vectors")


def searches(seen: Sequence[Scene], images: Sequence[str], read: Read) -> list[dict[str, Any]]:
    """Each of `SEARCHES`: how many pictures fit, and the first ones with their probability and whether they do."""
    logits = read([query.text for query in SEARCHES])
    probability = logits.sigmoid()
    fits = truth(seen, SEARCHES)
    found = []
    for column, query in enumerate(SEARCHES):
        best = logits[:, column].argsort(descending=True, stable=True)[:FOUND].tolist()
        results = [
            {"image": images[row], "probability": probability[row, column].item(), "fits": bool(fits[row, column])}
            for row in best
        ]
        found.append({"query": query.text, "fitting": int(fits[:, column].sum()), "results": results})
    return found


def table(facts: dict[str, Any]) -> str:
    """The figures, with chance beside them, and of each search how many of the first pictures fit."""
    rows = [["share", "chance", "best", "of"]]
    for figure in facts["figures"]:
        chance = "" if figure["chance"] is None else search_page.percent(figure["chance"])
        rows.append(
            [
                search_page.percent(figure["value"]),
                chance,
                search_page.percent(figure["best"]),
                f"{figure['asked']:,}",
                figure["text"],
            ]
        )
    lines = aligned([[*row, ""][:5] for row in rows], left=(4,))
    lines += ["", f"of the first {FOUND} pictures (or as many as there are) fit:"]
    for search in facts["searches"]:
        most = min(len(search["results"]), search["fitting"])
        lines.append(f'  {sum(r["fits"] for r in search["results"][:most])} of {most}  "{search["query"]}"')
    return "\n".join(lines)
