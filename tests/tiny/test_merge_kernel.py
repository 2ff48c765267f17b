"""The compiled kernel against PyTorch, bit for bit: types, tiles, edges, numbers that are hard to round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from export.lora.arithmetic import DTYPES
from export.lora.kernel import NARROW, STORED, WIDE, Fused, Tile, takes
from export.merge import merge
from tests.tiny.merge_jobs import random_adapter, weights
from tests.tiny.tiny_models import tiny_model

TYPES = st.sampled_from(sorted(STORED))
HARD = torch.tensor(
    [
        0.0,
        -0.0,
        float("inf"),
        1e-40,
        1e-45,
        3.3e38,
        65519.0,
        65520.0,
        6e-8,
        1 + 2**-8,
        1 + 3 * 2**-8,
        1 + 2**-8 + 2**-20,
        1 + 2**-11,
        1 + 3 * 2**-11,
    ]
)
"""Signed zeros, infinities, the smallest and largest numbers of each type, and ties between two of them."""


@settings(max_examples=60, deadline=None)
@given(
    TYPES,
    TYPES,
    st.sampled_from([WIDE, NARROW]),
    st.integers(0, 20),
    st.integers(0, 140),
    st.integers(1, 40),
    st.sampled_from([1.0, 2.0, 0.5, -0.3, 1.7]),
    st.integers(0, 99),
)
@example("BF16", "BF16", WIDE, 250, 2000, 16, 2.0, 0)
@example("BF16", "BF16", NARROW, 0, 0, 300, 0.7, 1)
def test_the_kernel_adds_as_pytorch_does(
    source: str, target: str, tile: Tile, rows: int, columns: int, rank: int, scale: float, seed: int
) -> None:
    make = torch.Generator().manual_seed(seed)
    height, rows, columns = tile.rows + rows + 5, tile.rows + rows, tile.width + columns
    # small whole numbers over a power of two: no product and no sum of them is rounded, in any order
    left = torch.randint(-64, 65, (height, rank), generator=make) / 256
    right = torch.randint(-64, 65, (rank, columns), generator=make) / 256
    weight = torch.randn(rows, columns, generator=make).to(DTYPES[source])
    result = torch.empty(rows, columns, dtype=DTYPES[target])
    Fused(left, right, scale, source, target, tile)(weight, 5, result)
    expected = weight.float() + torch.mm(left[5:], right).mul_(scale)
    assert result.equal(expected.to(DTYPES[target]))


@pytest.mark.parametrize("tile", [WIDE, NARROW])
@pytest.mark.parametrize("rank", [1, 2, 3, 16, 64, 256])
def test_ranks_are_summed_in_the_order_of_pytorch(tile: Tile, rank: int) -> None:
    make = torch.Generator().manual_seed(rank)
    left, right = torch.randn(40, rank, generator=make), torch.randn(rank, 200, generator=make)
    weight = torch.randn(40, 200, generator=make)
    result = torch.empty(40, 200)
    Fused(left, right, 0.3, "F32", "F32", tile)(weight, 0, result)
    assert result.equal(weight + torch.mm(left, right).mul_(0.3))


@pytest.mark.parametrize("tile", [WIDE, NARROW])
@pytest.mark.parametrize("target", sorted(STORED))
def test_numbers_that_are_hard_to_round(tile: Tile, target: str) -> None:
    weight = torch.cat([HARD, -HARD, torch.zeros(tile.width)]).expand(tile.rows, -1).contiguous()
    left, right = torch.zeros(tile.rows, 1), torch.ones(1, weight.shape[1])
    result = torch.empty(weight.shape, dtype=DTYPES[target])
    Fused(left, right, 1.0, "F32", target, tile)(weight, 0, result)
    assert (result + 0.0).equal(weight.to(DTYPES[target]) + 0.0)
    weight[0, 0], left[1, 0] = float("nan"), float("nan")
    Fused(left, right, 1.0, "F32", target, tile)(weight, 0, result)
    assert result[0, 0].isnan()
    assert result[1].isnan().all()
    assert not result[2:].isnan().any()


def test_weights_smaller_than_a_tile_are_merged_too(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", hidden=32, dtype="bfloat16")
    adapter = random_adapter(base, tmp_path / "adapter")
    merge(base, [adapter], tmp_path / "out", 10**9)
    before, after, lora = (weights(folder) for folder in (base, tmp_path / "out", adapter))
    name = "model.layers.0.self_attn.q_proj"
    assert not takes(before[f"{name}.weight"].shape, "BF16", "BF16")
    a, b = (lora[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert after[f"{name}.weight"].equal((before[f"{name}.weight"].float() + 2 * (b @ a)).bfloat16())
