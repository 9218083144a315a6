"""The start checkpoints: what they are trained on, and that the same seed gives the same bytes."""

import json
import random
from pathlib import Path

import pytest
import torch

import vlm
from vlm.demo import learning, pretrain, scenes, towers
from vlm.demo.start import ASSETS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("start")
    learning.make_tokenizer().save_pretrained(out / "gemma")
    return out


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(towers, "BATCH", 4)
    monkeypatch.setattr(pretrain, "DECODER_BATCH", 4)
    made = []
    for seed in (0, 0, 1):
        towers.pretrain_tower("siglip", folder / "siglip", folder / "gemma", seed, 2)
        pretrain.pretrain_decoder(folder / "gemma", seed, 2)
        made.append([(folder / part / "model.safetensors").read_bytes() for part in ("siglip", "gemma")])
    assert made[0] == made[1]
    assert made[0][0] != made[2][0] and made[0][1] != made[2][1]
    model, processor = vlm.new(folder / "siglip", "linear", folder / "gemma")
    assert vlm.generate(model, processor, [scenes.draw(scenes.make_scene(random.Random(0)))], ["caption en"])


def test_words_of_places_are_those_of_the_scene(folder: Path) -> None:
    words = learning.Words(folder / "gemma")
    scene = scenes.make_scene(random.Random(5))
    rows = towers._words_of_places(scene, words)
    assert rows.shape == (9, towers.PLACE_WORDS + 1)
    said = [words.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
    expected = {t.place: f"{t.size} {t.name} {t.place}" for t in scene.things}
    assert said == [expected.get(place, "") for place in scenes.PLACES]


def test_a_place_is_read_from_its_own_patches_only(folder: Path) -> None:
    torch.manual_seed(0)
    captioner = towers.PlaceCaptioner(501).eval()
    grid = towers.GRID
    features, ids = torch.randn(1, grid * grid, 128), torch.randint(3, 500, (1, 9, towers.PLACE_WORDS))
    before = captioner(features, ids)
    features[:, grid - 1] += 1.0  # the top right patch
    changed = (captioner(features, ids) - before).abs().amax(dim=(0, 2, 3)) > 1e-6
    assert changed.tolist() == [place == "top right" for place in scenes.PLACES]


@pytest.mark.parametrize("spread", [False, True])
def test_a_page_is_seen_both_ways_up_to_the_answer(folder: Path, spread: bool) -> None:
    words = learning.Words(folder / "gemma")
    page = pretrain.decoder_batch(random.Random(0), words, 6, spread=spread)
    bags = page.bags.shape[1]
    assert bags == (towers.GRID**2 if spread else learning.MOST_THINGS)
    for row in range(6):
        ids, targets = page.ids[row].tolist(), page.targets[row].tolist()
        supervised = [i for i, target in enumerate(targets) if target >= 0]
        first, last = supervised[0], supervised[-1]  # the newline, and the last word of the answer
        assert words.tokenizer.decode(ids[first]) == "\n" and targets[last] == 1
        assert targets[first:last] == ids[first + 1 : last + 1]
        assert page.weights[row].sum().item() == pytest.approx(1)
        real = [spread or bool(bag.any()) for bag in page.bags[row]] + [True] * (last + 1)
        for i in range(bags + last + 1):
            allowed = [ok and (j <= bags + first or j <= i) for j, ok in enumerate(real)]
            assert page.visible[row, i, : len(real)].tolist() == allowed
        assert not page.visible[row, : bags + last + 1, len(real) :].any()


def test_bags_say_what_stands_where(folder: Path) -> None:
    words = learning.Words(folder / "gemma")
    scene = scenes.make_scene(random.Random(8))
    expected = {f"{t.size} {t.name} {t.place}" for t in scene.things}
    for bags in (pretrain._things(random.Random(0), scene, words), pretrain._patches(random.Random(0), scene, words)):
        said = [words.tokenizer.decode(bag, skip_special_tokens=True).strip() for bag in bags]
        assert set(said) - {""} == expected
    for number, text in enumerate(said):  # the patches: each thing on patches of its own place
        row, column = (3 * k // towers.GRID for k in divmod(number, towers.GRID))
        assert not text or text.endswith(scenes.PLACES[3 * row + column])


def test_the_shipped_checkpoints_are_small_and_of_the_documented_shapes() -> None:
    files = [f for f in ASSETS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 6_000_000
    siglip, gemma = (json.loads((ASSETS / part / "config.json").read_text()) for part in ("siglip", "gemma"))
    assert siglip["model_type"] == "siglip" and gemma["model_type"] == "gemma3_text"
    vision = siglip["vision_config"]
    assert {key: vision[key] for key in towers.VISION} == towers.VISION
    assert {key: gemma[key] for key in pretrain.DECODER} == pretrain.DECODER
    shipped = (ASSETS / "gemma" / "tokenizer.json").read_text()
    assert json.loads(learning.make_tokenizer().backend_tokenizer.to_str())["model"] == json.loads(shipped)["model"]
