"""What a model costs, against counts by hand."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import loud, picture
from torch.nn import functional as F

import vlm.generation.text
from vlm.build.presets import tiny
from vlm.errors import ConfigError, DataError
from vlm.images.load import image_size, load_image
from vlm.measure import cost


def block(tokens: int, width: int, inner: int) -> int:
    """A transformer block: four square layers, scores and weighted sum, and a perceptron of two layers."""
    return 2 * (4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * inner)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_tower_by_hand(attention: str) -> None:
    """28 px with patch 14: 4 patches of 588 numbers, width 32, perceptron 64, two blocks."""
    model, processor = loud("siglip", "gemma", attention)
    found = cost.flops_per_image(model, processor, picture(0), "caption en")
    wanted = 2 * 4 * 588 * 32 + 2 * block(4, 32, 64)
    assert found["encoder"] == wanted == 285_696
    decoder_width = model.config.text_config.hidden_size
    assert found["projector"] == 2 * 4 * 32 * decoder_width
    assert found["total"] == sum(found[name] for name in ("encoder", "projector", "decoder"))


def test_the_decoder_by_hand() -> None:
    model, processor = loud("siglip", "gemma", "sdpa")
    text = model.config.text_config
    length = processor([picture(0)], ["caption en"]).input_ids.shape[1]
    width, inner, head = text.hidden_size, text.intermediate_size, text.head_dim
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    layer = length * width * (2 * queries + 2 * keys + 3 * inner) + 2 * length**2 * queries
    wanted = 2 * (text.num_hidden_layers * layer + width * text.vocab_size)
    angles = 2 * length * head // 2  # transformers 5.17 makes the rotary angles by a matrix product
    assert cost.flops_per_image(model, processor, picture(0), "caption en")["decoder"] in (wanted, wanted + angles)


def test_a_projector_that_states_its_own_count() -> None:
    model, processor = tiny("siglip", "gemma", projector={"kind": "resampler", "queries": 3, "heads": 4})
    found = cost.flops_per_image(model, processor, picture(0), "")
    assert found["projector"] == model.model.multi_modal_projector.flops((2, 2))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_naflex_images_cost_what_their_patches_cost() -> None:
    """56x14 px are 4 patches, as many as 28x28."""
    model, processor = loud("siglip2_naflex", "gemma")
    one, other = (
        cost.flops_per_image(model, processor, picture(0, size), "")["encoder"] for size in [(56, 14), (28, 28)]
    )
    assert one == other > 0


def test_fused_attention_is_counted() -> None:
    """2 images, 4 query heads, 5 queries, 7 keys of width 8: 2 x 2 x 2 x 4 x 5 x 7 x 8 operations, with fewer key
    heads as well."""
    query = torch.randn(2, 4, 5, 8)
    for heads in (4, 2):
        key = torch.randn(2, heads, 7, 8)
        found, _ = cost.counted(functools.partial(F.scaled_dot_product_attention, query, key, key, enable_gqa=True))
        assert found == 8960


def test_parameters_are_counted_once() -> None:
    model, _ = tiny("siglip", "gemma", projector="mlp")
    found = cost.count_parameters(model, ["projector", "decoder"])
    state = {name: value.numel() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert found["total"] == sum(state.values()) == found["encoder"] + found["projector"] + found["decoder"]
    assert found["encoder"] == sum(n for name, n in state.items() if "vision_tower" in name)
    assert found["embeddings"] == model.config.text_config.vocab_size * model.config.text_config.hidden_size
    assert found["trained"] == found["projector"] + found["decoder"]
    assert cost.count_parameters(model)["trained"] == 0
    with pytest.raises(ConfigError, match="did you mean 'encoder'"):
        cost.count_parameters(model, ["encodr"])


def test_image_tokens(tmp_path: Path) -> None:
    _, square = loud("siglip", "gemma")
    assert cost.image_tokens(square, [picture(0), picture(1, (90, 20))]) == {"mean": 4, "min": 4, "max": 4}
    model, naflex = loud("siglip2_naflex", "gemma")
    path = tmp_path / "a.png"
    picture(2, (300, 20)).save(path)
    images: list[Any] = [picture(0), picture(1, (90, 20)), path]
    counted = [int((naflex([image], [""]).input_ids == naflex.image_token_id).sum()) for image in images]
    assert len(set(counted)) > 1
    assert cost.image_tokens(naflex, images) == {
        "mean": sum(counted) / 3,
        "min": min(counted),
        "max": max(counted),
    }
    with pytest.raises(DataError, match="no images"):
        cost.image_tokens(square, [])


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_sizes_from_headers(suffix: str, turn: int, tmp_path: Path) -> None:
    image = picture(0, (30, 20))
    exif = image.getexif()
    exif[274] = turn
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    picture(1, (7, 9)).save(tmp_path / f"b.{suffix}")
    for name, wanted in (("a", (20, 30) if turn > 4 else (30, 20)), ("b", (7, 9))):
        path = tmp_path / f"{name}.{suffix}"
        assert image_size(path) == wanted == load_image(path).size
        assert image_size(path.read_bytes()) == wanted


def test_speed_does_all_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer is as long as asked, three images of batch size 2 are two batches, and each is run once more than
    is timed."""
    model, processor = loud("siglip", "gemma")
    lengths: list[tuple[int, ...]] = []
    original = vlm.generation.text.generate_ids

    def watched(*args: Any) -> torch.Tensor:
        output = original(*args)
        lengths.append(tuple(output.shape))
        return output

    monkeypatch.setattr(vlm.generation.text, "generate_ids", watched)
    model.train()
    images = [picture(i) for i in range(3)]
    found = cost.inference_speed(
        model, processor, images, ["caption en"] * 3, batch_size=2, max_new_tokens=3, repeats=2
    )
    assert lengths == [(2, 3), (1, 3)] * 3 and model.training
    model.eval()
    assert found["images_per_second"] * found["seconds_per_image"] == pytest.approx(1)
    assert found["encoder_images_per_second"] * found["encoder_seconds_per_image"] == pytest.approx(1)
    assert found["peak_memory_bytes"] > 50e6
    with pytest.raises(ConfigError, match="one prompt per image"):
        cost.inference_speed(model, processor, images, ["a"])
