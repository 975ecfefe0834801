"""The antidiagonal estimator against its specification, computed independently in float64, one row at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditattn.backends.selection import antidiagonal
from ditattn.errors import UnsupportedCall
from ditattn.ops.block_estimate import pure_torch
from ditattn.ops.block_estimate.pure_torch import estimate


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(length: int, heads: int, dim: int, seed: int = 0) -> Tensor:
    """Tokens whose neighbours resemble each other, as in video: block masses differ by far more than rounding."""
    steps = draw(1, length, heads, dim, seed=seed)
    return torch.cumsum(steps, 1) / torch.arange(1, length + 1).sqrt().view(1, -1, 1, 1) + 0.5 * draw(1, length, heads, dim, seed=seed + 1)


def specified_mass(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """Float64 block masses of one head, from `q` and `k` `[S, D]`, S a multiple of 8, straight from the definition of an antidiagonal."""
    stride, groups = 8, q.shape[0] // 8
    q, k = q.double().view(groups, stride, -1), k.double().view(groups, stride, -1)
    # score of tile (g, h): the sum over its antidiagonal, q token 7-i against k token i
    scores = sum(q[:, stride - 1 - i] @ k[:, i].T for i in range(stride)) * (scale / stride)
    if causal:
        scores = scores.masked_fill(torch.ones(groups, groups, dtype=torch.bool).triu(1), -torch.inf)
    weights = scores.softmax(-1)
    blocks = -(-q.shape[0] // 16)
    mass = torch.zeros(blocks, blocks, dtype=torch.float64)
    for row in range(blocks):
        for column in range(blocks):
            mass[row, column] = weights[row * 16 : (row + 1) * 16, column * 16 : (column + 1) * 16].sum()
    return mass


def specified_mask(mass: Tensor, row_sparse: float, threshold: float, causal: bool) -> tuple[Tensor, Tensor]:
    """(mask, guard `[M]`) by the operator's rule, near-ties included, for keep_sink and keep_recent."""
    blocks = mass.shape[0]
    mask = torch.zeros(blocks, blocks, dtype=torch.bool)
    guards = torch.zeros(blocks, dtype=torch.float64)
    for row in range(blocks):
        valid = row + 1 if causal else blocks
        if causal and valid <= 2:
            mask[row, :valid] = True
            continue
        x = mass[row, :valid].clone()
        x[0] = x[valid - 1] = 0
        ranked = x.sort(descending=True).values
        count = valid
        if threshold < 1:
            count = int((ranked.cumsum(0) < threshold * x.sum()).sum()) + 1
        guard = ranked[count - 1] if threshold < 1 else torch.tensor(0.0, dtype=torch.float64)
        if count > valid * row_sparse and valid >= 10:
            guard = ranked[int(valid * row_sparse) - 1]
        mask[row, :valid] = x > guard - 1e-5
        mask[row, 0] = mask[row, valid - 1] = True
        guards[row] = guard
    return mask, guards


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("row_sparse", "threshold"), [(0.8, 1.0), (0.5, 1.0), (0.25, 1.0), (0.1, 1.0), (0.8, 0.9), (0.3, 0.7)])
@pytest.mark.parametrize("length", [1280, 2688, 3016])
def test_agrees_with_the_specification(length: int, row_sparse: float, threshold: float, causal: bool) -> None:
    """At most 2 % of the entries differ, and none outside near-ties with the last kept block."""
    query, key = clustered(length, 2, 32), clustered(length, 2, 32, seed=10)
    blocks = -(-length // 128)
    plan = antidiagonal.select(
        query,
        key,
        scale=32**-0.5,
        sparsity=1 - row_sparse,
        protected=torch.zeros(blocks, dtype=torch.bool),
        threshold=threshold,
        causal=causal,
    )
    plan.check(1, 2)
    for head in range(2):
        mass = specified_mass(query[0, :, head], key[0, :, head], 32**-0.5, causal)
        expected, guards = specified_mask(mass, row_sparse, threshold, causal)
        differs = plan.to_mask()[0, head] != expected
        assert differs.float().mean() <= 0.02
        near_tie = (mass - guards.unsqueeze(-1)).abs() < 2e-5
        assert not bool((differs & ~near_tie).any())


def test_mass_of_a_full_row_is_the_number_of_folded_queries() -> None:
    x = draw(1, 1280, 1, 32)
    assert torch.allclose(estimate(x, x, scale=0.2).sum(-1), torch.tensor(16.0))


@pytest.mark.parametrize(("row_sparse", "expected"), [(0.8, 18), (0.5, 12), (0.2, 6), (0.1, 4)])
def test_kept_blocks_of_21(row_sparse: float, expected: int) -> None:
    """floor(K * row_sparse) and the two forced columns; the numbers are the operator's own."""
    x, y = draw(1, 21 * 128, 2, 32), draw(1, 21 * 128, 2, 32, seed=3)
    plan = antidiagonal.select(x, y, scale=0.2, sparsity=1 - row_sparse, protected=torch.zeros(21, dtype=torch.bool))
    assert bool((plan.counts == expected).all())


@given(sparsity=st.floats(0.0, 0.999), threshold=st.sampled_from([1.0, 0.95, 0.5]), causal=st.booleans())
def test_rows_never_exceed_the_asked_number(sparsity: float, threshold: float, causal: bool) -> None:
    x = torch.ones(1, 1536, 1, 32)
    plan = antidiagonal.select(
        x, x, scale=0.2, sparsity=sparsity, protected=torch.zeros(12, dtype=torch.bool), threshold=threshold, causal=causal
    )
    plan.check(1, 1)
    valid = torch.arange(1, 13) if causal else torch.full((12,), 12)
    kept = plan.counts[0, 0]
    cap = torch.tensor([max(1, math.floor(round(int(n) * (1 - sparsity), 6))) + 2 if n >= 10 else int(n) for n in valid])
    assert bool((kept <= cap.minimum(valid)).all())
    assert bool((kept >= 1).all())


def test_sparsity_near_one_keeps_at_least_one_block() -> None:
    """The operator reads index -1 there."""
    x, y = draw(1, 1536, 1, 32), draw(1, 1536, 1, 32, seed=2)
    plan = antidiagonal.select(
        x, y, scale=0.2, sparsity=0.99, protected=torch.zeros(12, dtype=torch.bool), keep_sink=False, keep_recent=False
    )
    assert bool((plan.counts == 1).all())


def test_forced_columns_are_optional() -> None:
    """The operator keeps column 0 and, in non-causal calls, the last column whatever its flags say."""
    key = draw(1, 1536, 1, 32)
    key[:, :128] = key[:, -128:] = 0
    query = key + 0.1
    arguments = {"scale": 1.0, "sparsity": 0.75, "protected": torch.zeros(12, dtype=torch.bool)}
    forced = antidiagonal.select(query, key, **arguments).to_mask()
    free = antidiagonal.select(query, key, keep_sink=False, keep_recent=False, **arguments).to_mask()
    assert bool(forced[..., 0].all())
    assert bool(forced[..., -1].all())
    assert not bool(free[..., 1:-1, 0].any())
    assert not bool(free[..., 1:-1, -1].any())


def test_unequal_lengths_use_the_keys_columns() -> None:
    """The operator sizes its mask by the query and is wrong for other keys."""
    query, key = draw(1, 1300, 1, 32), draw(1, 2000, 1, 32, seed=4)
    plan = antidiagonal.select(query, key, scale=0.2, sparsity=0.5, protected=torch.zeros(16, dtype=torch.bool))
    plan.check(1, 1)
    assert plan.num_key_blocks == 16
    assert int(plan.indices.max()) == 15


@pytest.mark.parametrize("tail", range(1, 9))
def test_a_short_tail_of_keys_is_scored(tail: int) -> None:
    """The operator ignores a tail shorter than the stride. Here its few strong keys win their block a place."""
    query, key = torch.ones(1, 1536, 1, 32), 0.01 * draw(1, 1536 + tail, 1, 32)
    key[:, 1536:] = 3.0
    mass = estimate(query, key, scale=1.0)
    assert bool((mass.argmax(-1) == 12).all())


def test_causal_denominators_are_triangular() -> None:
    """The operator's denominator runs past the diagonal; then strong future keys would empty the row."""
    query, key = torch.ones(1, 1536, 1, 32), 0.05 * draw(1, 1536, 1, 32)
    key[:, 768:] = 5.0
    mass = estimate(query, key, scale=1.0, causal=True)
    assert torch.allclose(mass[0, 0, :6].tril().sum(-1), torch.full((6,), 16.0))
    assert bool((mass.triu(1) == 0).all())


def test_keys_beyond_their_length_have_no_mass() -> None:
    query, key = draw(2, 1536, 1, 32), draw(2, 1536, 1, 32, seed=1)
    key[0, 1024:] = 50.0
    mass = estimate(query, key, scale=1.0, key_lengths=torch.tensor([1024, 1536]))
    assert bool((mass[0, ..., 8:] == 0).all())
    assert bool((mass[1, ..., 8:].sum() > 0).all())


def test_layout_does_not_matter() -> None:
    """The operator is inaccurate for [B, S, H, D]."""
    x = draw(1, 4, 1536, 32).transpose(1, 2)
    strided = estimate(x, x, scale=0.2)
    assert torch.equal(strided, estimate(x.contiguous(), x.contiguous(), scale=0.2))


def test_a_short_call_does_not_change_later_ones() -> None:
    """The operator keeps tiling state between calls."""
    x, short = draw(1, 2560, 1, 32), draw(1, 200, 1, 32)
    before = estimate(x, x, scale=0.2)
    estimate(short, short, scale=0.2)
    assert torch.equal(estimate(x, x, scale=0.2), before)


def test_grouped_heads_use_their_own_keys() -> None:
    query, key = draw(1, 1280, 4, 32), draw(1, 1280, 2, 32, seed=5)
    grouped = estimate(query, key, scale=0.2)
    assert torch.equal(grouped, estimate(query, key.repeat_interleave(2, dim=2), scale=0.2))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(1, 2560, 1, 32), draw(1, 2560, 1, 32, seed=6)
    whole = estimate(x, y, scale=0.2)
    monkeypatch.setattr(pure_torch, "CHUNK_SCORES", 1)
    assert torch.allclose(estimate(x, y, scale=0.2), whole, atol=1e-6)


def test_autocast_does_not_coarsen_the_estimate() -> None:
    query, key = clustered(1300, 2, 32), clustered(1300, 2, 32, seed=3)
    expected = estimate(query, key, scale=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(estimate(query, key, scale=0.2), expected)


@pytest.mark.parametrize("stride", [7, 48, 256, 0])
def test_a_stride_that_does_not_divide_the_block_is_refused(stride: int) -> None:
    query = draw(1, 300, 1, 32)
    with pytest.raises(UnsupportedCall, match=f"must divide the block size of 128 tokens, {stride} does not"):
        antidiagonal.select(query, query, scale=0.2, sparsity=0.5, protected=torch.zeros(3, dtype=torch.bool), stride=stride)
