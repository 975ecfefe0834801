"""Mean-pool selection: the asked number of blocks, the right ones, per batch element and head."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from ditattn.backends.selection import mean_pool
from ditattn.plan.block_plan import num_kept


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def no_protection(blocks: int) -> torch.Tensor:
    return torch.zeros(blocks, dtype=torch.bool)


@given(blocks=st.integers(1, 700), percent=st.integers(0, 99))
def test_number_kept_is_the_exact_ceiling(blocks: int, percent: int) -> None:
    exact = -(-Fraction(blocks) * (100 - percent) // 100)
    assert num_kept(blocks, percent / 100) == max(1, int(exact))


def test_keeps_the_best_scores() -> None:
    query, key = draw(2, 1200, 4, 32), draw(2, 1000, 2, 32, seed=1)
    plan = mean_pool.select(query, key, scale=0.3, sparsity=0.6, protected=no_protection(8))
    plan.check(2, 4)
    q, k = oracle.block_mean(query, 128), oracle.block_mean(key, 128)
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k.repeat_interleave(2, dim=2)) * 0.3
    best = scores.softmax(-1).topk(4, dim=-1).indices.sort(-1).values
    assert torch.equal(plan.indices[..., :4].long(), best)
    assert bool((plan.counts == 4).all())


@given(sparsity=st.floats(0, 0.99), seed=st.integers(0, 5))
def test_every_row_keeps_exactly_the_asked_number(sparsity: float, seed: int) -> None:
    x = draw(2, 1400, 2, 32, seed=seed)
    plan = mean_pool.select(x, x, scale=0.2, sparsity=sparsity, protected=no_protection(11))
    assert bool((plan.counts == num_kept(11, sparsity)).all())


def test_protected_blocks_come_on_top() -> None:
    x = draw(1, 1280, 2, 32)
    protected = torch.arange(10) == 3
    plan = mean_pool.select(x, x, scale=0.2, sparsity=0.7, protected=protected)
    mask = plan.to_mask()
    free = mean_pool.select(x, x, scale=0.2, sparsity=0.7, protected=no_protection(10)).to_mask()
    expected = free | protected | protected.unsqueeze(-1)
    assert torch.equal(mask, expected)
    assert bool(mask[..., 3].all())
    assert bool(mask[..., 3, :].all())


def test_ties_keep_the_lowest_indices() -> None:
    """The original keeps every block that ties with the last kept one; constant regions and zero padding tie a lot."""
    x = torch.ones(1, 1280, 1, 32)
    plan = mean_pool.select(x, x, scale=0.2, sparsity=0.6, protected=no_protection(10))
    assert bool((plan.counts == 4).all())
    assert plan.indices[0, 0, :, :4].tolist() == [[0, 1, 2, 3]] * 10


def test_scores_that_underflow_in_a_softmax_are_still_ranked() -> None:
    query = torch.full((1, 128, 1, 32), 10.0)
    levels = torch.tensor([0.0, -9.0, -3.0, -6.0])
    key = levels.repeat_interleave(128).view(1, 512, 1, 1).expand(1, 512, 1, 32).contiguous()
    plan = mean_pool.select(query, key, scale=1.0, sparsity=0.5, protected=no_protection(4))
    assert plan.indices[0, 0, 0, :2].tolist() == [0, 2]


def test_batch_elements_and_heads_get_their_own_plans() -> None:
    x = torch.cat([draw(1, 1280, 2, 32), draw(1, 1280, 2, 32, seed=7)])
    plan = mean_pool.select(x, x, scale=0.2, sparsity=0.7, protected=no_protection(10))
    assert not torch.equal(plan.indices[0], plan.indices[1])
    assert not torch.equal(plan.indices[0, 0], plan.indices[0, 1])
    alone = mean_pool.select(x[1:], x[1:], scale=0.2, sparsity=0.7, protected=no_protection(10))
    assert torch.equal(plan.indices[1:], alone.indices)


@pytest.mark.parametrize("length", [1280, 1281, 1407])
def test_tail_block_is_the_mean_of_its_real_tokens(length: int) -> None:
    """No empty block after an exact multiple, whose mean would be NaN; a short tail competes on equal terms."""
    x = draw(1, length, 1, 32)
    x[:, 1280:] = 4.0
    plan = mean_pool.select(x, x, scale=1.0, sparsity=0.9, protected=no_protection(-(-length // 128)))
    plan.check(1, 1)
    assert plan.num_key_blocks == -(-length // 128)
    if length > 1280:
        assert bool(plan.to_mask()[0, 0, -1, 10])


def test_nan_blocks_are_kept() -> None:
    """Dropping them would hide a NaN that dense attention shows."""
    x = draw(1, 1280, 1, 32)
    x[0, 700, 0, 3] = torch.nan
    plan = mean_pool.select(x, x, scale=0.2, sparsity=0.9, protected=no_protection(10))
    rows = [row for row in range(10) if row != 5]
    assert bool(plan.to_mask()[0, 0, rows, 5].all())


def test_autocast_does_not_coarsen_the_scores() -> None:
    """Scores that differ by less than bf16 can tell are ranked as in fp32."""
    query, key = torch.ones(1, 128, 1, 32), torch.ones(1, 512, 1, 32)
    key[:, 256:384] += 1e-4
    plan = mean_pool.select(query, key, scale=1.0, sparsity=0.75, protected=no_protection(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = mean_pool.select(query, key, scale=1.0, sparsity=0.75, protected=no_protection(4))
    assert plan.indices.flatten()[0] == 2
    assert torch.equal(coarse.indices, plan.indices)
