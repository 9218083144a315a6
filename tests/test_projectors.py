"""Every file in vlm/projectors keeps the contract (a new file is picked up by itself), and each projector against an
independent reference: one image alone, loops, torch's own layers or transformers' classes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from coretools import shake
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vlm.errors import ConfigError
from vlm.model import projecting
from vlm.projectors import resampler
from vlm.registry import kinds

WIDTH, OUT = 8, 12
GRIDS = [(4, 4), (1, 7), (7, 1), (4, 4), (3, 5), (1, 1), (1, 7), (2, 6)]  # two shapes come twice, apart
SETTINGS: list[dict[str, Any]] = [
    *({"kind": kind} for kind in kinds("vlm.projectors")),
    {"kind": "mlp", "depth": 3, "activation": "silu"},
    {"kind": "pixel_shuffle", "factor": 1},
    {"kind": "pixel_shuffle", "factor": 3},
    {"kind": "pool", "factor": 3},
    {"kind": "pool", "rows": 2, "columns": 3},
    {"kind": "pool", "rows": 5, "columns": 1},
    {"kind": "resampler", "queries": 5, "depth": 3, "heads": 2},
]
each = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
weighted = pytest.mark.parametrize("settings", [s for s in SETTINGS if s["kind"] != "identity"], ids=str)


def build(settings: dict[str, Any], loud: bool = True) -> Any:
    projector = projecting.build(settings, WIDTH, WIDTH if settings["kind"] == "identity" else OUT)
    if loud:
        shake(projector)
    return projector.eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(grids: list[tuple[int, int]] = GRIDS) -> list[Tensor]:
    """float[rows * columns, WIDTH] for each grid."""
    return [noise(math.prod(grid), WIDTH, seed=seed) for seed, grid in enumerate(grids)]


def padded(
    features: list[Tensor], grids: list[tuple[int, int]] = GRIDS, fill: float = 0.0, extra: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch as a NaFlex tower gives it."""
    longest = max(map(len, features)) + extra
    batch, mask = torch.full((len(features), longest, WIDTH), fill), torch.zeros(len(features), longest)
    for row, values in enumerate(features):
        batch[row, : len(values)], mask[row, : len(values)] = values, 1
    return batch, mask.bool(), torch.tensor(grids)


def tokens_of(projector: Any, *inputs: Any) -> list[Tensor]:
    """The tokens of each image, padding dropped."""
    with torch.no_grad():
        tokens, mask = projector(*inputs)
    return list(tokens) if mask is None else [row[kept] for row, kept in zip(tokens, mask, strict=True)]


def alone(projector: Any, values: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens_of(projector, values[None], None, torch.tensor([grid]))[0]


# --- the contract


def test_the_six_kinds_are_found() -> None:
    assert {"linear", "mlp", "pixel_shuffle", "resampler", "pool", "identity"} <= set(kinds("vlm.projectors"))


@each
def test_images_of_a_batch_are_as_alone(settings: dict[str, Any]) -> None:
    """Different grids, 1 x n and n x 1 among them, with padding that is not zero."""
    projector, features = build(settings), images()
    together = tokens_of(projector, *padded(features, fill=7.0, extra=3))
    for values, grid, tokens in zip(features, GRIDS, together, strict=True):
        single = alone(projector, values, grid)
        assert tokens.shape == single.shape == (projector.num_tokens(grid), tokens.shape[1])
        assert torch.allclose(tokens, single, atol=1e-5) and float(single.std()) > 0.01


@each
@pytest.mark.parametrize("fill", [1e4, math.inf, math.nan])
def test_padding_rows_do_not_matter(settings: dict[str, Any], fill: float) -> None:
    projector, features = build(settings), images()
    clean, dirty = (tokens_of(projector, *padded(features, fill=value)) for value in (0.0, fill))
    for one, other in zip(clean, dirty, strict=True):
        assert torch.equal(one, other)


@each
def test_another_image_of_the_batch_does_not_matter(settings: dict[str, Any]) -> None:
    projector, features = build(settings), noise(2, 16, WIDTH)
    changed = torch.stack([features[0], -features[1]])
    grid = torch.tensor([[4, 4], [4, 4]])
    one, two = (tokens_of(projector, values, None, grid) for values in (features, changed))
    assert torch.equal(one[0], two[0]) and not torch.allclose(one[1], two[1])


@each
def test_one_shape_without_a_mask(settings: dict[str, Any]) -> None:
    """A fixed-resolution tower: no mask in, none out."""
    projector = build(settings)
    tokens, mask = projector(noise(3, 15, WIDTH), None, torch.tensor([[3, 5]] * 3))
    assert mask is None and tokens.shape[:2] == (3, projector.num_tokens((3, 5)))


@each
def test_different_shapes_without_a_mask(settings: dict[str, Any]) -> None:
    """Three grids of twelve patches: every row is a patch, yet the numbers of tokens may differ."""
    projector, grids = build(settings), [(12, 1), (3, 4), (2, 6)]
    features = images(grids)
    together = tokens_of(projector, torch.stack(features), None, torch.tensor(grids))
    for values, grid, tokens in zip(features, grids, together, strict=True):
        single = alone(projector, values, grid)
        assert tokens.shape == single.shape and torch.allclose(tokens, single, atol=1e-5)


@each
def test_number_of_tokens(settings: dict[str, Any]) -> None:
    """Declared = produced = counted without the projector, for all grids up to 9 x 9; longer axes never give fewer."""
    projector = build(settings)
    for grid in itertools.product(range(1, 10), range(1, 10)):
        count = projecting.num_tokens(settings, grid)
        assert count == projector.num_tokens(grid) == len(alone(projector, noise(math.prod(grid), WIDTH), grid)) >= 1
        for longer in ((grid[0] + 1, grid[1]), (grid[0], grid[1] + 1)):
            assert projecting.num_tokens(settings, longer) >= count


@weighted
def test_silent_when_fresh(settings: dict[str, Any]) -> None:
    """Training starts from the decoder's own distribution; `init_weights` brings the silence back."""
    fresh = build(settings, loud=False)
    assert list(fresh.parameters())
    for _ in range(2):
        assert all(not tokens.any() for tokens in tokens_of(fresh, *padded(images())))
        shake(fresh)
        assert all(tokens.any() for tokens in tokens_of(fresh, *padded(images())))
        projecting.init_weights(fresh)


@weighted
def test_a_fresh_projector_learns(settings: dict[str, Any]) -> None:
    """The last layer is zero, not the ones before it: two steps move every parameter."""
    projector = build(settings, loud=False)
    before = {name: p.detach().clone() for name, p in projector.named_parameters()}
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.1)
    for _ in range(2):
        tokens, mask = projector(*padded(images()))
        real = tokens.flatten(0, 1) if mask is None else tokens[mask]
        (real * noise(*real.shape, seed=9)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in projector.named_parameters():
        assert not torch.equal(parameter, before[name]), name


@each
def test_gradients(settings: dict[str, Any]) -> None:
    """Every parameter and every real patch has a finite gradient, padding none, though padding is huge."""
    projector = build(settings)
    features, mask, grid = padded(images(), fill=1e4, extra=1)
    features.requires_grad_()
    tokens, kept = projector(features, mask, grid)
    real = tokens.flatten(0, 1) if kept is None else tokens[kept]
    (real * noise(*real.shape, seed=9)).sum().backward()
    for name, parameter in projector.named_parameters():
        assert parameter.grad is not None and 0 < float(parameter.grad.abs().max()) < math.inf, name
    assert features.grad is not None and not features.grad[~mask].any()
    assert (features.grad[mask].abs().amax(-1) > 0).all()


@each
def test_bfloat16(settings: dict[str, Any]) -> None:
    projector, inputs = build(settings), padded(images())
    full = torch.cat(tokens_of(projector, *inputs))
    half = torch.cat(tokens_of(projector.to(torch.bfloat16), inputs[0].bfloat16(), *inputs[1:]))
    assert half.dtype == torch.bfloat16 and (half.float() - full).abs().mean() < 0.05 * full.std()


@each
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 9)])
def test_flops(settings: dict[str, Any], grid: tuple[int, int]) -> None:
    """As torch counts them."""
    projector = build(settings).requires_grad_(False)
    # The fused attention of a CPU is not in torch's table; the plain one is two matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        alone(projector, noise(math.prod(grid), WIDTH), grid)
    assert projector.flops(grid) == counter.get_total_flops()


# --- references


def test_linear_is_torch_linear() -> None:
    projector, values = build({"kind": "linear"}), noise(15, WIDTH)
    wanted = values.numpy() @ projector.linear.weight.detach().numpy().T + projector.linear.bias.detach().numpy()
    assert np.allclose(alone(projector, values, (3, 5)), wanted, atol=1e-6)


def test_mlp_is_llava() -> None:
    """LLaVA 1.5's projector in transformers, with its weights."""
    config = LlavaConfig(
        vision_config={"model_type": "siglip_vision_model", "hidden_size": WIDTH},
        text_config={"model_type": "llama", "hidden_size": OUT, "num_attention_heads": 1},
        projector_hidden_act="gelu",
    )
    original = LlavaMultiModalProjector(config)
    projector = build({"kind": "mlp"})
    projector.layers[0].load_state_dict(original.linear_1.state_dict())
    projector.layers[1].load_state_dict(original.linear_2.state_dict())
    values = noise(16, WIDTH)
    with torch.no_grad():
        assert torch.allclose(alone(projector, values, (4, 4)), original(values), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("gelu", lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("relu", lambda x: max(x, 0.0)),
        ("silu", lambda x: x / (1 + math.exp(-x))),
    ],
)
def test_activations(name: str, formula: Any) -> None:
    projector, values = build({"kind": "mlp", "activation": name}), noise(16, WIDTH).double()
    first, last = (
        (layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()) for layer in projector.layers
    )
    hidden = np.vectorize(formula)(values.numpy() @ first[0].T + first[1])
    got = alone(projector.double(), values, (4, 4))
    assert np.allclose(got, hidden @ last[0].T + last[1], atol=1e-12)


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("grid", sorted(set(GRIDS)))
def test_pixel_shuffle_is_torch_pixel_unshuffle(factor: int, grid: tuple[int, int]) -> None:
    """On the image with zeros below and to the right; torch orders channels (feature, row, column)."""
    projector, values = build({"kind": "pixel_shuffle", "factor": factor}), noise(math.prod(grid), WIDTH)
    rows, columns = (math.ceil(side / factor) * factor for side in grid)
    image = torch.zeros(WIDTH, rows, columns)
    image[:, : grid[0], : grid[1]] = values.T.reshape(WIDTH, *grid)
    unshuffled = F.pixel_unshuffle(image[None], factor)[0]
    blocks = unshuffled.reshape(WIDTH, factor, factor, -1).permute(3, 1, 2, 0).flatten(1)
    assert torch.allclose(alone(projector, values, grid), projector.linear(blocks), atol=1e-5)


@pytest.mark.parametrize("factor", [2, 4])
def test_pixel_shuffle_is_idefics3(factor: int) -> None:
    """Idefics3's connector (SmolVLM's too) in transformers, with its weights, on the square grids that it takes."""
    config = Idefics3Config(
        vision_config={"hidden_size": WIDTH},
        text_config={"model_type": "llama", "hidden_size": OUT, "num_attention_heads": 1},
        scale_factor=factor,
    )
    connector = Idefics3Connector(config).eval()
    projector = build({"kind": "pixel_shuffle", "factor": factor}, loud=False)
    projector.linear.weight.data.copy_(connector.modality_projection.proj.weight)
    values = noise(64, WIDTH)
    with torch.no_grad():
        assert torch.allclose(alone(projector, values, (8, 8)), connector(values[None])[0], atol=1e-6)


@pytest.mark.parametrize("grid", sorted(set(GRIDS)))
@pytest.mark.parametrize("target", [(2, 3), (5, 1), (3, 3)])
def test_pool_to_a_grid_is_adaptive_average(grid: tuple[int, int], target: tuple[int, int]) -> None:
    """By the definition: cell i of n covers the patches from floor(i * size / n) to ceil((i + 1) * size / n)."""
    settings = {"kind": "pool", "rows": target[0], "columns": target[1]}
    projector, values = build(settings), noise(math.prod(grid), WIDTH)
    image = values.numpy().reshape(*grid, WIDTH)
    cells = [
        [(i * size // n, -(-(i + 1) * size // n)) for i in range(n)]
        for size, n in ((grid[0], min(grid[0], target[0])), (grid[1], min(grid[1], target[1])))
    ]
    means = [image[a:b, c:d].reshape(-1, WIDTH).mean(0) for a, b in cells[0] for c, d in cells[1]]
    wanted = projector.linear(torch.from_numpy(np.stack(means)))
    assert torch.allclose(alone(projector, values, grid), wanted, atol=1e-5)


@pytest.mark.parametrize("grid", sorted(set(GRIDS)))
@pytest.mark.parametrize("factor", [2, 3])
def test_pool_by_a_factor_averages_blocks(grid: tuple[int, int], factor: int) -> None:
    projector, values = build({"kind": "pool", "factor": factor}), noise(math.prod(grid), WIDTH)
    image = values.numpy().reshape(*grid, WIDTH)
    means = [
        image[i : i + factor, j : j + factor].reshape(-1, WIDTH).mean(0)
        for i in range(0, grid[0], factor)
        for j in range(0, grid[1], factor)
    ]
    wanted = projector.linear(torch.from_numpy(np.stack(means)))
    assert torch.allclose(alone(projector, values, grid), wanted, atol=1e-5)


def places(grid: tuple[int, int]) -> Tensor:
    """The resampler's place embedding by its definition, number by number."""
    rows = []
    for row, column in itertools.product(range(grid[0]), range(grid[1])):
        numbers = []
        for place in ((row + 0.5) / grid[0] * 16, (column + 0.5) / grid[1] * 16):
            angles = [place / 10_000 ** (i / (WIDTH // 4)) for i in range(WIDTH // 4)]
            numbers += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        rows.append(numbers)
    return torch.tensor(rows)


@pytest.mark.parametrize("grid", sorted(set(GRIDS)))
def test_resampler_is_multihead_attention(grid: tuple[int, int]) -> None:
    """torch's own attention layer on one image alone, no mask."""
    projector = build({"kind": "resampler", "queries": 5, "depth": 2, "heads": 4})
    values = noise(math.prod(grid), WIDTH)
    with torch.no_grad():
        queries, content = projector.queries, projector.norm(values)
        for block in projector.blocks:
            attention = torch.nn.MultiheadAttention(WIDTH, 4, bias=False)
            attention.in_proj_weight.copy_(torch.cat([block.query.weight, block.key.weight, block.value.weight]))
            attention.out_proj.weight.copy_(block.out.weight)
            queries = queries + attention(block.query_norm(queries), content + places(grid), content)[0]
            queries = queries + block.down(F.gelu(block.up(block.mlp_norm(queries))))
        wanted = projector.linear(projector.out_norm(queries))
    assert torch.allclose(alone(projector, values, grid), wanted, atol=1e-4)


def test_resampler_knows_places() -> None:
    """Patches in another order give other tokens, which attention without places could not tell apart."""
    projector, values = build({"kind": "resampler", "queries": 3}), noise(12, WIDTH)
    assert not torch.allclose(alone(projector, values, (3, 4)), alone(projector, values.flip(0), (3, 4)), atol=1e-2)


def test_places_are_shares_of_the_image() -> None:
    """The middle patch of three is in the middle of any odd grid; rows and columns are told apart."""
    small = resampler.place_embedding(torch.tensor([[4]]), torch.tensor([[3, 3]]), 16)
    large = resampler.place_embedding(torch.tensor([[24]]), torch.tensor([[7, 7]]), 16)
    assert torch.allclose(small, large, atol=1e-6)
    tall, wide = (
        resampler.place_embedding(torch.arange(5)[None], torch.tensor([grid]), 16) for grid in ((5, 1), (1, 5))
    )
    assert torch.allclose(tall[..., :8], wide[..., 8:]) and not torch.allclose(tall, wide, atol=0.1)


def test_identity_changes_nothing() -> None:
    projector = build({"kind": "identity"})
    features, mask, grid = padded(images())
    tokens, kept = projector(features, mask, grid)
    assert tokens is features and kept is mask and not list(projector.parameters())


# --- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "pol"}, "unknown projector 'pol' (did you mean 'pool'?)"),
        ({"kind": "pool", "factr": 2}, "has no setting 'factr' (did you mean 'factor'?)"),
        ({"kind": "pool", "rows": 2}, "got rows=2; give rows and columns, or factor alone"),
        ({"kind": "pool", "rows": 2, "columns": 2, "factor": 2}, "got rows=2, columns=2, factor=2"),
        ({"kind": "pool", "factor": 0}, "projector pool: factor is 0, expected an integer of at least 1"),
        ({"kind": "pool", "rows": 2.0, "columns": 2}, "rows is 2.0"),
        ({"kind": "pixel_shuffle", "factor": True}, "factor is True"),
        ({"kind": "resampler", "queries": 0}, "queries is 0"),
        ({"kind": "resampler", "heads": 3}, "3 heads do not fit a tower of width 8; choose heads from 1, 2, 4, 8"),
        ({"kind": "mlp", "depth": 1}, "for one layer use 'linear'"),
        ({"kind": "mlp", "activation": "glu"}, "activation is 'glu' (did you mean 'gelu'?)"),
        (
            {"kind": "identity"},
            "8 wide, the decoder's embeddings 12; they must be equal, or use the projector 'linear'",
        ),
        ("pool", "projector settings are 'pool'"),
    ],
)
def test_wrong_settings_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        projecting.build(settings, WIDTH, OUT)
    assert message in str(error.value)


def test_a_width_without_places_is_refused() -> None:
    with pytest.raises(ConfigError, match="a multiple of 4"):
        projecting.build({"kind": "resampler", "heads": 1}, 6, OUT)
