"""The start checkpoints: what they are trained on, and that the same seed gives the same bytes."""

import json
import random
from pathlib import Path

import pytest
import torch

import vlm
from vlm.demo import pretrain, scenes
from vlm.demo.run import ASSETS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("start")
    pretrain.make_tokenizer().save_pretrained(out / "gemma")
    return out


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "TOWER_BATCH", 4)
    monkeypatch.setattr(pretrain, "DECODER_BATCH", 4)
    made = []
    for seed in (0, 0, 1):
        for job in (pretrain.pretrain_tower, pretrain.pretrain_decoder):
            job(folder, seed, 2)
        made.append([(folder / part / "model.safetensors").read_bytes() for part in ("siglip", "gemma")])
    assert made[0] == made[1]
    assert made[0][0] != made[2][0] and made[0][1] != made[2][1]
    model, processor = vlm.new(folder / "siglip", "linear", folder / "gemma")
    assert vlm.generate(model, processor, [scenes.draw(scenes.make_scene(random.Random(0)))], ["caption en"])


def test_words_of_places_are_those_of_the_scene(folder: Path) -> None:
    words = pretrain._Words(folder)
    scene = scenes.make_scene(random.Random(5))
    rows = pretrain._words_of_places(scene, words)
    assert rows.shape == (9, pretrain.PLACE_WORDS + 1)
    said = [words.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
    expected = {t.place: f"{t.size} {t.name} {t.place}" for t in scene.things}
    assert said == [expected.get(place, "") for place in scenes.PLACES]


def test_a_place_is_read_from_its_own_patches_only(folder: Path) -> None:
    torch.manual_seed(0)
    captioner = pretrain.PlaceCaptioner(501).eval()
    grid = pretrain.GRID
    features, ids = torch.randn(1, grid * grid, 128), torch.randint(3, 500, (1, 9, pretrain.PLACE_WORDS))
    before = captioner(features, ids)
    features[:, grid - 1] += 1.0  # the top right patch
    changed = (captioner(features, ids) - before).abs().amax(dim=(0, 2, 3)) > 1e-6
    assert changed.tolist() == [place == "top right" for place in scenes.PLACES]


def test_questions_of_a_page_see_the_description_and_themselves(folder: Path) -> None:
    words = pretrain._Words(folder)
    page = pretrain.decoder_batch(random.Random(0), words, 2)
    patches = pretrain.GRID**2
    ids = page.ids[0].tolist()
    starts = [patches + i for i, token in enumerate(ids) if token == 2]  # BOS opens each question
    end = patches + len([i for i in ids if i])
    assert len(starts) >= 3
    visible = page.visible[0]
    assert visible[:patches, :patches].all() and not visible[:patches, patches:].any()
    for start, stop in zip(starts, [*starts[1:], end], strict=True):
        assert visible[start:stop, :patches].all()
        assert not visible[start:stop, patches:start].any() and not visible[start:stop, stop:].any()
        supervised = [i for i in range(start, stop) if page.targets[0, i - patches] >= 0]
        first = supervised[0]  # the newline: the last token of the prefix
        assert visible[start : first + 1, start : first + 1].all()
        for i in range(first + 1, stop):
            assert visible[i, start:stop].tolist() == [j <= i for j in range(start, stop)]
        answer = page.targets[0, first - patches : stop - patches].tolist()
        assert answer == [*ids[first + 1 - patches : stop - patches], 1]
        assert page.weights[0, first - patches : stop - patches].sum().item() == pytest.approx(1)


def test_the_shipped_checkpoints_are_small_and_of_the_documented_shapes() -> None:
    files = [f for f in ASSETS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 6_000_000
    siglip, gemma = (json.loads((ASSETS / part / "config.json").read_text()) for part in ("siglip", "gemma"))
    assert siglip["model_type"] == "siglip" and gemma["model_type"] == "gemma"
    vision = siglip["vision_config"]
    assert {key: vision[key] for key in pretrain.VISION} == pretrain.VISION
    assert {key: gemma[key] for key in pretrain.DECODER} == pretrain.DECODER
    shipped = (ASSETS / "gemma" / "tokenizer.json").read_text()
    assert json.loads(pretrain.make_tokenizer().backend_tokenizer.to_str())["model"] == json.loads(shipped)["model"]
