"""The package's SigLIP with both towers: its texts and their truth, its loss, its files."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, SiglipConfig, SiglipModel

from vlm.checkpoints.places import DEMO_SIGLIP, locate
from vlm.demo import captions, dual, queries, scenes, towers
from vlm.demo.learning import Words
from vlm.demo.queries import Query, Said
from vlm.demo.start import ASSETS
from vlm.model.loss import sigmoid_contrastive

SMALL = dual.Part(1, 2, 2)


def drawn(seed: int, count: int = 40) -> list[scenes.Scene]:
    rng = random.Random(seed)
    first = [scenes.make_scene(rng, most=4) for _ in range(count)]
    return [one for scene in first for one in (scene, scenes.make_like(rng, scene))]


# --- Texts ----------------------------------------------------------------------------------------------------------


def test_truth_is_that_of_the_captions_checker() -> None:
    """Texts that are captions too: the checker parses the words, and knows nothing of what they were written from."""
    rng, seen = random.Random(1), drawn(1)
    asked = [query for scene in seen for query in (queries.write(rng, scene) for _ in range(4))]
    parsed = [query for query in asked if captions.is_caption(query.text)]
    expected = [[captions.check(scene, query.text).true for query in parsed] for scene in seen]
    assert len(parsed) > 60 and sum(map(sum, expected)) > 2 * len(parsed)
    assert queries.truth(seen, parsed).tolist() == expected


def test_every_text_is_true_of_its_scene_and_all_kinds_are_written() -> None:
    rng, seen = random.Random(2), drawn(2, 100)
    asked = [queries.write(rng, scene) for scene in seen]
    assert queries.truth(seen, asked).diagonal().all()
    texts = {query.text for query in asked}
    assert {"red", "two shapes"} & texts and any("above" in text for text in texts)
    assert all(text == text.lower() for text in texts)


def test_truth_by_hand() -> None:
    two = scenes.arrange(random.Random(0), {("red", "star"): 1, ("red", "circle"): 7})
    red, star, circle = Said(colour="red"), Said(shape="star"), Said(shape="circle")
    cases = {
        Query("red", (red,)): True,
        Query("two red things", (red, red)): True,
        Query("two stars", (star, star)): False,  # two words for things need two things
        Query("a star above a circle", (star, circle), "above"): True,
        Query("a circle above a star", (circle, star), "above"): False,
        Query("a red shape above a star", (red, star), "above"): False,  # only the circle is another one, and below
        Query("a star at the top", (Said(shape="star", place="top"),)): True,
        Query("a star at the top left", (Said(shape="star", place="top left"),)): False,
        Query("two shapes", number=2): True,
        Query("three shapes", number=3): False,
        Query("one star", number=1, counted=star): True,
        Query("no star", number=0, counted=star): False,
        Query("one shape: a star", (star,), number=1): False,
        Query("green", (Said(colour="green"),)): False,
    }
    got = queries.truth([two], list(cases))[0].tolist()
    assert dict(zip((query.text for query in cases), got, strict=True)) == {q.text: t for q, t in cases.items()}


def test_a_scene_like_another_differs_and_keeps_the_rules() -> None:
    rng = random.Random(3)
    for before in [scenes.make_scene(rng, most=4) for _ in range(300)]:
        after = scenes.make_like(rng, before, (*scenes.CHANGES, scenes.MIX))
        was, now = ([(t.name, t.place) for t in scene.things] for scene in (before, after))
        assert was != now and len(set(was) ^ set(now)) <= 4
        assert len({t.name for t in after.things}) == len(after.things) <= 4
        assert len({t.place for t in after.things}) == len(after.things) > 0
        assert all(scenes.HELD_OUT[t.colour, t.shape] != 3 * t.row + t.column for t in after.things)


def test_colours_are_exchanged_and_nothing_else() -> None:
    before = scenes.arrange(random.Random(0), {("red", "star"): 1, ("blue", "circle"): 4})
    after = scenes.make_like(random.Random(0), before, (scenes.MIX,))
    assert [(t.name, t.place) for t in after.things] == [("blue star", "top"), ("red circle", "center")]


# --- Training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dual")
    dual.make_tokenizer().save_pretrained(out)
    return out


def test_words_are_pieces(folder: Path) -> None:
    words = Words(folder)
    for text in ("red star above blue circle", "a photo of a large teal triangle at the bottom right", "two crosses"):
        assert len(words(text)) == len(text.split())


def test_the_loss_is_the_published_one_where_a_text_fits_one_picture(folder: Path) -> None:
    """Algorithm 1 of the paper has z = 1 on the diagonal alone."""
    model = SiglipModel(SiglipConfig(text_config={**dual.TEXT, "vocab_size": 700}, vision_config=towers.VISION)).eval()
    given = dual.batch(random.Random(0), Words(folder), SMALL)
    texts, true = given.texts[:4], torch.eye(4, dtype=torch.bool)
    with torch.no_grad():
        theirs = model(input_ids=texts, pixel_values=given.pixels, return_loss=True)
        ours = dual.loss(model, dual.Batch(given.pixels, texts, true))
    assert torch.allclose(ours, theirs.loss, rtol=1e-5)
    assert torch.allclose(ours, sigmoid_contrastive(theirs.logits_per_image), rtol=1e-5)


def test_the_same_seed_gives_the_same_bytes(folder: Path) -> None:
    made = []
    for seed in (0, 0, 1):
        dual.pretrain_dual(folder, ASSETS / "siglip", seed, (SMALL, replace(SMALL, groups=1, alike=4)))
        made.append((folder / "model.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]
    model = AutoModel.from_pretrained(folder)
    assert isinstance(model, SiglipModel)


# --- The shipped files ----------------------------------------------------------------------------------------------


def test_what_is_shipped_is_what_the_command_makes(folder: Path) -> None:
    """But for the weights, which take minutes: tokenizer, sizes, image settings, and the format of the numbers."""
    shipped = locate(DEMO_SIGLIP)
    assert sum(file.stat().st_size for file in shipped.iterdir()) <= 3_000_000
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (shipped / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((shipped / "config.json").read_text())
    assert {key: config["text_config"][key] for key in dual.TEXT} == dual.TEXT
    assert {key: config["vision_config"][key] for key in towers.VISION} == towers.VISION
    assert json.loads((shipped / "preprocessor_config.json").read_text()) == towers.PREPROCESSOR


def test_transformers_reads_texts_as_they_were_trained(folder: Path) -> None:
    """The tokenizer's own settings are the rule of SigLIP 2: no BOS, EOS, padding on the right, no mask."""
    tokenizer = AutoTokenizer.from_pretrained(locate(DEMO_SIGLIP))
    given = tokenizer(["a red star"], padding="max_length", truncation=True)
    ids = Words(folder)("a red star")
    assert list(given) == ["input_ids"]
    assert given["input_ids"] == [[*ids, 1, *[0] * (dual.CONTEXT - len(ids) - 1)]]
