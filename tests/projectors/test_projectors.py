"""Projectors with a dial: what is foretold is what comes, and formulas by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import avg_pool2d, softmax
from transformers.models.llava_next.modeling_llava_next import unpad_image

from mmcompress import SpecError
from mmcompress.elastic import ElasticProjector
from mmcompress.projectors._anyres import unpadded
from mmcompress.projectors.m3 import M3
from mmcompress.projectors.mqt import MQT, sincos
from mmcompress.projectors.tokenflex import TokenFLEX
from mmcompress.projectors.tokenpacker import TokenPacker
from mmcompress.projectors.tokenpacker_hd import TokenPackerHD

PINPOINTS = [(672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def built() -> dict[str, tuple[ElasticProjector, Tensor]]:
    """Every module in miniature, each with what it takes."""
    torch.manual_seed(0)
    return {
        "m3": (M3(8), noise(2, 64, 6)),
        "mqt": (MQT(3, 10, 2, 8).eval(), noise(2, 25, 8)),
        "tokenpacker": (TokenPacker(2, 6, 8, 10, 2).eval(), noise(2, 36, 32)),
        "tokenflex": (TokenFLEX(5, 8, 10).eval(), noise(2, 25, 8)),
    }


BUILT = built()
every_module = pytest.mark.parametrize("name", BUILT)


@every_module
def test_every_budget_gives_what_it_says_beforehand(name: str) -> None:
    module, features = BUILT[name]
    assert sorted(module.budgets()) == list(module.budgets())
    for budget in module.budgets():
        tokens = module(features, budget)
        assert tokens.shape[:2] == (2, budget)
        assert module.tokens_for((100, 200), budget) == budget
        alone = torch.cat([module(image[None], budget) for image in features])
        torch.testing.assert_close(tokens, alone, rtol=1e-5, atol=1e-6)


@every_module
@pytest.mark.parametrize("budget", [0, -1, 10**6, 2.0, True, "4", None])
def test_a_budget_the_dial_does_not_have_is_refused(name: str, budget: Any) -> None:
    module, features = BUILT[name]
    with pytest.raises(SpecError, match=f"{type(module).__name__} has no budget {budget!r}: it"):
        module(features, budget)
    with pytest.raises(SpecError, match="has no budget"):
        module.tokens_for((10, 10), budget)


# --- M3


def test_m3_scales_are_the_papers() -> None:
    assert M3().budgets() == (1, 9, 36, 144, 576)
    assert M3(16).budgets() == (1, 4, 16, 64, 256)
    assert M3(27).budgets() == (1, 729)
    assert M3(24, [144, 64]).budgets() == (64, 144)


def test_m3_pools_as_a_chain_of_halves() -> None:
    tiles = noise(2, 576, 5)
    grid = tiles.transpose(1, 2).unflatten(2, (24, 24))
    for scale in (144, 36, 9):
        grid = avg_pool2d(grid, 2)
        torch.testing.assert_close(M3()(tiles, scale), grid.flatten(2).transpose(1, 2))
    torch.testing.assert_close(M3()(tiles, 1), tiles.mean(dim=1, keepdim=True))
    assert torch.equal(M3()(tiles, 576), tiles)


@pytest.mark.parametrize(("budget", "kept"), [(100, 144), (50, 64), (300, 576), (4, 4), (576, 576)])
def test_m3_official_lands_on_what_it_floors_to(budget: int, kept: int) -> None:
    official = M3(compat="official")
    assert official.tokens_for((336, 336), budget) == kept == official(noise(1, 576, 2), budget).shape[1]


@pytest.mark.parametrize(("scale", "count"), [(576, 1948), (144, 494), (36, 114), (9, 37), (1, 7)])
def test_m3_counts_tiles_after_pooling(scale: int, count: int) -> None:
    m3 = M3(resolutions=PINPOINTS)
    assert m3.crops((720, 1280)) == (2, 2)
    assert m3.tokens_for((720, 1280), scale) == count


@settings(max_examples=30, deadline=None)
@given(st.integers(20, 1500), st.integers(20, 1500), st.sampled_from([1, 9, 36, 144]))
def test_m3_joins_as_many_as_it_counts(height: int, width: int, scale: int) -> None:
    m3 = M3(resolutions=PINPOINTS)
    rows, columns = m3.crops((height, width))
    joined = m3.join(torch.zeros(1 + rows * columns, scale, 1), (height, width), torch.ones(1))
    assert len(joined) == m3.tokens_for((height, width), scale)
    assert not joined[:scale].any()
    assert set(joined[scale:].unique().tolist()) <= {0.0, 1.0}


# --- MQT


def test_mqt_fewer_queries_are_the_first_of_more() -> None:
    module, features = BUILT["mqt"]
    for budget in (1, 4, 8):
        torch.testing.assert_close(module(features, budget), module(features, 9)[:, :budget], rtol=1e-5, atol=1e-6)


def test_mqt_equals_attention_over_positions() -> None:
    module, features = BUILT["mqt"]
    assert isinstance(module, MQT)
    query = module.ln_q(module.query + module.pos_embed)
    key = module.ln_k(module.places(25))
    expected = [module.attn(query, key, module.ln_v(image))[0] @ module.proj for image in features]
    torch.testing.assert_close(module(features, 9), torch.stack(expected))


def test_mqt_holds_a_constant_until_it_trains() -> None:
    torch.manual_seed(0)
    module, features = MQT(3, 10, 2, 8).eval(), noise(2, 25, 8)
    fresh = module(features, 5)
    module.precompute(25)
    torch.testing.assert_close(module(features, 5), fresh)
    assert "attention" not in module.state_dict()
    with torch.no_grad():
        module.query.normal_(std=3.0)
    assert torch.equal(module(features, 5), module(features, 5)) and torch.allclose(module(features, 5), fresh)
    torch.testing.assert_close(module(noise(1, 36, 8), 5).shape, torch.Size([1, 5, 10]))  # another grid is no mistake
    module.train()
    assert not torch.allclose(module(features, 5), fresh)
    module(features, 5).sum().backward()
    assert module.query.grad is not None and module.query.grad[:5].any() and not module.query.grad[5:].any()
    assert module.pos_embed.grad is None


def test_mqt_forgets_its_constant_with_its_weights() -> None:
    torch.manual_seed(0)
    module, other, features = MQT(3, 10, 2, 8).eval().precompute(25), MQT(3, 10, 2, 8).eval(), noise(2, 25, 8)
    module.load_state_dict(other.state_dict())
    torch.testing.assert_close(module(features, 5), other(features, 5))


@settings(max_examples=50, deadline=None)
@given(
    st.tuples(st.integers(20, 1500), st.integers(20, 1500)), st.sampled_from([(24, 48), (48, 48), (48, 24), (24, 72)])
)
@example((352, 748), (24, 72))  # 51 columns, of which floating point makes 50.999999999999993
def test_padding_is_what_transformers_takes_for_it(image_size: tuple[int, int], grid: tuple[int, int]) -> None:
    rows, columns = unpadded(grid, image_size)
    numbers = torch.arange(grid[0] * grid[1]).view(1, *grid)
    assert torch.equal(numbers[0, rows, columns], unpad_image(numbers, image_size)[0])


def test_sincos_has_columns_first() -> None:
    table = sincos(16, 1024)
    assert torch.equal(table[0, :256], torch.zeros(256)) and torch.equal(table[0, 256:512], torch.ones(256))
    assert torch.equal(table[1, 512:], table[0, 512:]) and not torch.equal(table[1, :512], table[0, :512])
    assert torch.equal(table[16, :512], table[0, :512])
    expected = torch.sin(torch.tensor(3.0, dtype=torch.float64) * 10000 ** (-2 * 10 / 512))
    assert float(table[3, 10]) == float(expected.half())


# --- TokenPacker


@pytest.mark.parametrize("scale", [2, 3])
def test_tokenpacker_attends_to_windows(scale: int) -> None:
    torch.manual_seed(0)
    side, width = 6, 8
    module = TokenPacker(scale, side, width, 10, 2).eval()
    fine = noise(1, side**2, 4 * width)
    coarse = fine[0, :, -width:].view(side, side, width)
    packed = []
    for row in range(0, side, scale):
        for column in range(0, side, scale):
            window = [(row + i) * side + column + j for i in range(scale) for j in range(scale)]
            cells = coarse[row : row + scale, column : column + scale]
            sampled = cells.mean(dim=(0, 1)) if scale == 2 else cells[1, 1]
            query = module.ln_q_1(module.q_proj_1(sampled))[None]
            key, value = (
                module.ln_k_1(module.k_proj_1(fine[0, window])),
                module.ln_v_1(module.v_proj_1(fine[0, window])),
            )
            packed.append(_attend(module.clip_attn, query, key, value))
    torch.testing.assert_close(module(fine, len(packed))[0], module.mlp(torch.cat(packed)), rtol=1e-5, atol=1e-6)


def _attend(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    parts = zip((query, key, value), attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    q, k, v = (part @ weight.T + bias for part, weight, bias in parts)
    heads = []
    for head in range(attention.num_heads):
        own = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        rows = softmax(q[:, own] @ k[:, own].T / attention.head_dim**0.5, dim=-1)
        heads.append(rows @ v[:, own])
    return attention.out_proj(torch.cat(heads, dim=-1))


@pytest.mark.parametrize(("size", "grid"), [((100, 100), (1, 1)), ((500, 1000), (2, 4)), ((1200, 300), (4, 1))])
def test_tokenpacker_hd_cuts_and_joins(size: tuple[int, int], grid: tuple[int, int]) -> None:
    hd = TokenPackerHD(TokenPacker(2, 4, 8, 10, 2), tiles=9, pixels=56)
    rows, columns = hd.grid(size)
    assert hd.grid((size[0] * 336 // 56, size[1] * 336 // 56)) and rows * columns <= 9
    tiles = hd.cut(torch.ones(3, *size))
    assert tiles.shape == (rows * columns + (rows * columns > 1), 3, 56, 56)
    budget = hd.budgets()[0]
    comma, newline = torch.full((1,), -1.0), torch.full((1,), -2.0)
    numbers = torch.arange(len(tiles)).repeat_interleave(budget).view(len(tiles), budget, 1).float()
    joined = hd.join(numbers, size, comma, newline)[:, 0].tolist()
    assert len(joined) == hd.tokens_for(size, budget)
    assert joined.count(-1.0) == rows * (columns - 1) and joined.count(-2.0) == rows + (rows * columns > 1)
    assert joined[:budget] == [0.0] * budget and joined[-1] == -2.0
    assert [joined[budget]] == ([-1.0] if columns > 1 else [-2.0])


def test_tokenpacker_hd_shows_an_overview_of_the_padded_canvas() -> None:
    hd = TokenPackerHD(TokenPacker(2, 4, 8, 10, 2), tiles=9, pixels=56)
    size = (56, 100)  # a row of two tiles, the right end of the second empty
    assert hd.grid(size) == (1, 2)
    tiles = hd.cut(torch.ones(1, *size))
    canvas = torch.cat([tiles[0], tiles[1]], dim=2)[0]
    assert canvas[:, :100].all() and not canvas[:, 100:].any()
    overview = tiles[2, 0]
    height = round(56 * 56 / 100)
    assert not overview[height:].any()  # at the aspect of the image
    assert overview[0, 48] > 0.9 and overview[0, 55] < 0.1  # but with what is empty squeezed in


def test_tokenpacker_hd_knows_its_numbers_of_tiles() -> None:
    with pytest.raises(SpecError, match="tiles=10 must be one of 9, 16, 25"):
        TokenPackerHD(TokenPacker(2, 4, 8, 10, 2), tiles=10)
    packer = TokenPacker(2, 4, 8, 10, 2)
    assert TokenPackerHD(packer, 16).grid((1001, 1415)) == (3, 4)
    assert TokenPackerHD(packer, 9).grid((163, 1469)) == (1, 9)


# --- TokenFLEX


def test_tokenflex_pools_where_the_target_divides_and_enlarges_first_where_it_does_not() -> None:
    torch.manual_seed(0)
    module, features = TokenFLEX(4, 8, 10).eval(), noise(1, 16, 8)
    grid = features.transpose(1, 2).unflatten(2, (4, 4))
    norm, f1, f2, g = (module.mlp[name] for name in ("layernorm", "f1", "f2", "g"))

    def project(tokens: Tensor) -> Tensor:
        z = norm(tokens.flatten(2).transpose(1, 2))
        gate = f1(z)
        return g(gate * torch.sigmoid(gate) * f2(z))

    torch.testing.assert_close(module(features, 4), project(avg_pool2d(grid, 2)))
    larger = torch.nn.functional.interpolate(grid, (6, 6), mode="bilinear", align_corners=True)
    torch.testing.assert_close(module(features, 9), project(avg_pool2d(larger, 2)))
