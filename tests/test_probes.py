"""Probes of a tower: against brute force in numpy, by hand, and on data whose answer is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coretools import picture, shake
from PIL import Image
from torch.nn import functional as F

from vlm.errors import ConfigError, DataError
from vlm.measure.probes import Labelled, features, knn, linear, probe, read_labelled
from vlm.model import classifiers
from vlm.model.classifiers import fit, held_out
from vlm.model.parts import encoder_spec


def tower(kind: str) -> tuple[Any, Any]:
    """A tiny tower with noise on its weights, and its image transform."""
    module = encoder_spec(kind)
    encoder = module.encoder(module.tiny())
    shake(encoder)
    settings = {"max_num_patches": 16} if kind == "siglip2_naflex" else {}
    return encoder, module.transform(encoder.config, **settings)


def clusters(per_class: int, classes: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Far apart groups of points around their own direction."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0)) * 10
    labels = torch.arange(classes).repeat(per_class)
    return centres[labels] + torch.randn(len(labels), width, generator=generator), labels


# --- features


def test_features_are_the_mean_of_each_image_by_itself() -> None:
    encoder, transform = tower("siglip")
    images = [picture(seed, (30, 20)) for seed in range(5)]
    got = features(encoder, transform, images, batch_size=2)
    assert got.shape == (5, 32) and got.dtype == torch.float32
    for row, image in zip(got, images, strict=True):
        with torch.no_grad():
            wanted = encoder(transform([image]).pixel_values).features[0].mean(0)
        assert (row - wanted).abs().max() < 1e-5


def test_naflex_features_leave_padding_out() -> None:
    encoder, transform = tower("siglip2_naflex")
    images = [picture(1, (60, 20)), picture(2, (28, 28)), picture(3, (20, 90))]
    got = features(encoder, transform, images, batch_size=3)
    for row, image in zip(got, images, strict=True):
        pixels = transform([image])
        assert bool(pixels.pixel_attention_mask.all())
        with torch.no_grad():
            alone = encoder(*pixels[:3]).features[0].mean(0)
        assert (row - alone).abs().max() < 1e-5


def test_features_leave_the_tower_as_it_was() -> None:
    encoder, transform = tower("siglip")
    encoder.train()
    encoder.encoder.layers[0].eval()
    modes = [module.training for module in encoder.modules()]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert not features(encoder, transform, [picture(0)]).requires_grad
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_every_bad_image_is_named(tmp_path: Path) -> None:
    encoder, transform = tower("siglip")
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path in paths:
        picture(0).save(path)
    paths[1].write_bytes(b"")
    paths[4].write_bytes(b"no image")
    with pytest.raises(DataError, match="2 of 5 images(.|\n)*1.png(.|\n)*4.png") as caught:
        features(encoder, transform, paths, batch_size=2)
    assert "0.png" not in str(caught.value)


def test_a_tower_that_diverged_is_refused() -> None:
    encoder, transform = tower("siglip")
    with torch.no_grad():
        encoder.post_layernorm.bias[0] = math.nan
    with pytest.raises(DataError, match="NaN"):
        features(encoder, transform, [picture(0)])


# --- annotations


def test_labelled_files_list_all_their_problems(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    lines: list[dict[str, Any]] = [
        {"image": "a.png", "label": "cat"},
        {"image": "../a.png", "label": "cat"},
        {"image": "b.png", "label": "cat"},
        {"image": "a.png"},
        {"image": "a.png", "label": " "},
        {"image": "a.png", "label": 3},
        {"image": "a.png", "labels": "cat"},
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError) as caught:
        read_labelled(file)
    text = str(caught.value)
    wanted = {2: "outside-root", 3: "missing-image", 4: "missing-key", 5: "empty", 6: "wrong-type", 7: "unknown-key"}
    for line, code in wanted.items():
        assert f"train.jsonl:{line}: {code}" in text
    file.write_text(json.dumps(lines[0]) + "\n" + json.dumps({**lines[0], "id": "x"}))
    assert read_labelled(file) == [Labelled(i, (tmp_path / "a.png").resolve(), "cat") for i in ("1", "x")]


# --- nearest neighbours


def by_brute_force(train: np.ndarray, test: np.ndarray, labels: np.ndarray, classes: int, k: int) -> list[int]:
    answers = []
    for row in test.astype(np.float64):
        near = [float(row @ other / np.linalg.norm(row) / np.linalg.norm(other)) for other in train.astype(np.float64)]
        votes = np.zeros(classes)
        for index in np.argsort(near)[::-1][:k]:
            votes[labels[index]] += np.exp(near[index] / 0.07)
        answers.append(int(votes.argmax()))
    return answers


@pytest.mark.parametrize("k", [1, 3, 20])
def test_knn_is_brute_force(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifiers, "_SIMILARITIES", 200)  # several chunks
    generator = torch.Generator().manual_seed(k)
    train, test = torch.randn(60, 5, generator=generator), torch.randn(40, 5, generator=generator)
    labels = torch.randint(0, 4, (60,), generator=generator)
    got, settings = knn(train, test, labels, 4, k=k)
    assert got.tolist() == by_brute_force(train.numpy(), test.numpy(), labels.numpy(), 4, k)
    assert settings["k"] == k


def test_near_neighbours_weigh_more() -> None:
    """Cosines 1, 0.8, 0.8: class 0 votes 1, class 1 votes 2 exp(-0.2 / 0.07) = 0.11; at temperature 1 it is 1.64."""
    train = torch.tensor([[1.0, 0], [0.8, 0.6], [0.8, -0.6]])
    labels = torch.tensor([0, 1, 1])
    assert knn(train, torch.tensor([[5.0, 0]]), labels, 2)[0].tolist() == [0]
    chosen, settings = knn(train, torch.tensor([[5.0, 0]]), labels, 2, temperature=1.0)
    assert chosen.tolist() == [1]
    assert settings["k"] == 3 and settings["k_asked"] == 20


# --- linear classifier


def test_two_points_by_hand() -> None:
    """Points 0 and 2 of two classes, standardised to -1 and 1. By symmetry the weights are (-w, w) with no bias, and
    the loss is log(1 + exp(-2w)) + l2 w^2, so that l2 w = 1 / (1 + exp(2w))."""
    found = fit(torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1]), 2, l2=0.1)
    w = float(found.weight[1, 0])
    assert abs(0.1 * w - 1 / (1 + math.exp(2 * w))) < 1e-6 and w > 0
    assert float((found.weight[0] + found.weight[1]).abs()) < 1e-6 and float(found.bias.abs().max()) < 1e-6
    assert found.converged and (found.mean.item(), found.scale.item()) == (1, 1)


def test_the_gradient_vanishes_and_the_start_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=generator) * torch.tensor([1, 10, 0.1, 1, 1, 0]) + 3
    y = torch.randint(0, 3, (40,), generator=generator)
    found = fit(x, y, 3, 0.01)
    weight, bias = found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_()
    values = (x.double() - found.mean) / found.scale
    loss = F.cross_entropy(values @ weight.T + bias, y) + 0.005 * weight.square().sum()
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert max(float(g.abs().max()) for g in gradients) < 1e-5
    again = fit(x, y, 3, 0.01, start=fit(x, y, 3, 1e-4))
    assert (again.weight - found.weight).abs().max() < 1e-3
    assert found.scale[5] == 1 and float(found.weight[:, 5].abs().max()) < 1e-6  # a feature that never changes


def test_the_held_out_part_has_a_fifth_of_each_class() -> None:
    labels = torch.tensor([0] * 10 + [1] * 2 + [2] * 1 + [3] * 16)
    fitted, held = held_out(labels)
    assert sorted(fitted.tolist() + held.tolist()) == list(range(29))
    assert labels[held].bincount(minlength=4).tolist() == [2, 1, 0, 3]
    assert torch.equal(held, held_out(labels)[1])


def test_the_penalty_is_chosen_on_the_held_out_part() -> None:
    """Weak signal in one of 60 features and 40 images: hardly any penalty means noise is learnt by heart."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(80) % 2
    x = torch.randn(80, 60, generator=generator)
    x[:, 0] += labels * 3.0
    settings = linear(x[:40], x[40:], labels[:40], 2)[1]
    assert settings["l2"] >= 0.1 and settings["l2_chosen_on"] == 8 and settings["converged"]


def test_known_answers() -> None:
    """All right where classes lie apart; with shuffled labels no better than guessing one of four."""
    train, labels = clusters(30, 4, 8, seed=1)
    test, wanted = clusters(30, 4, 8, seed=2)
    mixed = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))]
    for classify in (knn, linear):
        assert torch.equal(classify(train, test, labels, 4)[0], wanted)
        assert float((classify(train, test, mixed, 4)[0] == wanted).float().mean()) < 0.45


# --- a whole probe


def coloured(colour: str, seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    tint = torch.tensor({"red": [180, 0, 0], "blue": [0, 0, 180], "green": [0, 180, 0]}[colour])
    values = tint + torch.randint(0, 60, (28, 28, 3), generator=generator)
    return Image.fromarray(values.to(torch.uint8).numpy())


def items(colours: tuple[str, ...], count: int, seed: int) -> list[Labelled]:
    return [Labelled(f"{c}{i}", coloured(c, seed + i), c) for c in colours for i in range(count)]


def test_a_tower_tells_colours_apart_and_what_it_never_learnt_is_wrong() -> None:
    encoder, transform = tower("siglip")
    train = items(("red", "blue"), 8, seed=0)
    test = items(("blue", "green", "red"), 3, seed=100)
    found = probe(encoder, transform, train, test, batch_size=5)
    assert list(found) == ["knn", "linear"]
    for result in found.values():
        assert result.accuracy == 6 / 9 and (result.num_train, result.num_test, result.num_classes) == (16, 9, 2)
        assert result.per_item == {item.id: item.label != "green" for item in test}
        assert result.settings["unseen_labels"] == ["green"] and result.settings["unseen_items"] == 3
        json.dumps(result.settings)
    assert found["knn"].settings["k"] == 16
    assert found == probe(encoder, transform, train, test, batch_size=9)


def test_images_in_both_sets_are_counted(tmp_path: Path) -> None:
    encoder, transform = tower("siglip")
    for name in ("a", "b", "c"):
        picture(ord(name)).save(tmp_path / f"{name}.png")
    train = [Labelled(n, tmp_path / f"{n}.png", n) for n in ("a", "b")]
    test = [Labelled(n, tmp_path / f"{n}.png", "a") for n in ("a", "c")]
    assert probe(encoder, transform, train, test)["knn"].settings["images_in_both"] == 1


@pytest.mark.parametrize(
    ("train", "test", "k", "message"),
    [
        ([], [Labelled("1", picture(0), "a")], 20, "got 0 and 1"),
        ([Labelled("1", picture(0), "a")] * 2, [Labelled("1", picture(0), "a")], 20, "at least two classes"),
        (items(("red", "blue"), 1, 0), [Labelled("1", picture(0), "red")] * 2, 20, "more than once"),
        (items(("red", "blue"), 1, 0), items(("red",), 1, 0), 0, "k is 0"),
    ],
)
def test_refusals(train: list[Labelled], test: list[Labelled], k: int, message: str) -> None:
    encoder, transform = tower("siglip")
    with pytest.raises((DataError, ConfigError), match=message):
        probe(encoder, transform, train, test, k=k)
