"""What KVQuant learns: thresholds as published, and centroids about as good as the published ones, or better."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmcompress.policies import _codebooks as codebooks

GOLDEN = Path(__file__).parents[1] / "golden" / "kv" / "kvquant_C128.safetensors"
OUTLIERS = 0.01


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_file(GOLDEN).items()}


def test_thresholds_are_those_published(golden: dict[str, Tensor]) -> None:
    lower, upper = codebooks.ends(golden["k_calib"], OUTLIERS, dim=0)
    torch.testing.assert_close(lower[0], golden["k_thr_lower"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(upper[0], golden["k_thr_upper"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("half", "dim"), [("k", 0), ("v", 1)])
def test_centroids_are_as_good_as_those_published(half: str, dim: int, bits: int, golden: dict[str, Tensor]) -> None:
    states, weights = golden[f"{half}_calib"], golden[f"{half}_fisher"]
    points, weights = codebooks.between(states, weights, *codebooks.ends(states, OUTLIERS, dim))
    found = codebooks.centroids(points, weights, bits)
    published = golden[f"{half}_nuq{bits}_centroids_sorted"]
    assert found.shape == published.shape and (found.diff() > 0).all()
    assert codebooks.error(points, weights, found) <= 1.02 * codebooks.error(points, weights, published)
    assert torch.equal(found, codebooks.centroids(points, weights, bits))


def test_all_of_a_layer(golden: dict[str, Tensor]) -> None:
    given = [golden[name] for name in ("k_calib", "k_fisher", "v_calib", "v_fisher")]
    layer = codebooks.calibrated(*given, bits=3, outliers=OUTLIERS)
    assert layer.key_lower.shape == layer.key_upper.shape == (128,)
    for centroids, states, weights, dim in (
        (layer.key_centroids, *given[:2], 0),
        (layer.value_centroids, *given[2:], 1),
    ):
        inside = codebooks.between(states, weights, *codebooks.ends(states, OUTLIERS, dim))
        assert torch.equal(centroids, codebooks.centroids(*inside, 3))


def test_weights_decide_where_centroids_are() -> None:
    points = torch.tensor([-1.0, -0.9, 0.0, 0.1, 0.2, 0.3, 0.8, 1.0])
    everywhere = codebooks.centroids(points, torch.ones(8), 2)
    torch.testing.assert_close(everywhere, torch.tensor([-0.95, 0.05, 0.25, 0.9]))
    heavy = torch.tensor([0.0, 0.0, 9.0, 9.0, 9.0, 9.0, 0.0, 0.0])
    torch.testing.assert_close(codebooks.centroids(points, heavy, 2), points[2:6], atol=1e-6, rtol=0)
    assert codebooks.centroids(points, torch.zeros(8), 2).isfinite().all()


def test_equal_points_are_read_as_they_are() -> None:
    points = torch.full((20,), 0.25)
    found = codebooks.centroids(points, torch.ones(20), 2)
    assert torch.equal(found, torch.full((4,), 0.25))
    states = torch.full((5, 3), 2.0)
    assert codebooks.between(states, states, *codebooks.ends(states, OUTLIERS, 0))[0].eq(0).all()


def test_quantiles_interpolate() -> None:
    values = torch.randn(3, 101, generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    for share in (0.0, 0.005, 0.37, 1.0):
        torch.testing.assert_close(codebooks.quantile(values, share), values.quantile(share, dim=1, keepdim=True))
