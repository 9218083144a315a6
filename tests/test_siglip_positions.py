"""The load-time resize of a FixRes tower's position table, against scipy (what big_vision calls) and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import SiglipVisionConfig

from vlm.encoders import siglip
from vlm.encoders.siglip import resample_position_table
from vlm.errors import ConfigError

SIDES = [(4, 7), (16, 32), (7, 3), (5, 5), (3, 1), (1, 4), (2, 9)]


def table(side: int) -> torch.Tensor:
    return torch.randn(side * side, 6, generator=torch.Generator().manual_seed(side))


def by_hand(values: np.ndarray, new: int) -> np.ndarray:
    """float64[old, old, E] -> [new, new, E]: linear interpolation of rows, then of columns, corner to corner."""
    old = values.shape[0]
    at = np.linspace(0, old - 1, new) if new > 1 else np.zeros(1)
    rows = np.apply_along_axis(lambda line: np.interp(at, np.arange(old), line), 0, values)
    return np.apply_along_axis(lambda line: np.interp(at, np.arange(old), line), 1, rows)


@pytest.mark.parametrize(("old", "new"), SIDES)
def test_it_is_linear_interpolation_between_corners(old: int, new: int) -> None:
    values = table(old)
    got = resample_position_table(values, new * new)
    wanted = by_hand(values.double().numpy().reshape(old, old, -1), new).reshape(new * new, -1)
    assert got.shape == (new * new, 6) and got.dtype == torch.float32
    assert abs(got.numpy() - wanted).max() < 5e-6


@pytest.mark.parametrize(("old", "new"), SIDES)
def test_it_is_scipys_zoom(old: int, new: int) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    values = table(old)
    grid = values.numpy().reshape(old, old, -1)
    wanted = ndimage.zoom(grid, (new / old, new / old, 1), order=1).reshape(new * new, -1)
    assert abs(resample_position_table(values, new * new).numpy() - wanted).max() < 5e-6


def test_bfloat16_is_computed_in_float32() -> None:
    """One rounding at the end, and the table itself when nothing changes."""
    values = table(4).bfloat16()
    got = resample_position_table(values, 49)
    assert got.dtype == torch.bfloat16 and torch.equal(got, resample_position_table(values.float(), 49).bfloat16())
    assert torch.equal(resample_position_table(values, 16), values)


@pytest.mark.parametrize(("old", "new"), [(12, 16), (16, 12), (16, 0), (16, -4)])
def test_only_squares(old: int, new: int) -> None:
    with pytest.raises(ConfigError, match=f"{old} -> {new}: .* no square number"):
        resample_position_table(torch.zeros(old, 2), new)


def test_a_resampled_tower_reads_the_new_size() -> None:
    """Corners keep their embedding, and the tower runs."""
    config = siglip.tiny()
    tower = siglip.Encoder._from_config(config).eval()
    bigger = SiglipVisionConfig(**{**config.to_dict(), "image_size": 56})
    grown = siglip.Encoder._from_config(bigger).eval()
    state = tower.state_dict()
    name = "embeddings.position_embedding.weight"
    state[name] = resample_position_table(state[name], 16)
    grown.load_state_dict(state)
    output = grown(torch.zeros(1, 3, 56, 56))
    assert output.grid.tolist() == [[4, 4]] and output.features.isfinite().all()
    old, new = tower.state_dict()[name], grown.state_dict()[name]
    for corner, there in ((0, 0), (1, 3), (2, 12), (3, 15)):
        assert torch.allclose(old[corner], new[there])
