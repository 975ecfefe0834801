"""What it costs to let a mean stand in for a block, against the formula spelled out in float64; and exact budgets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditattn.backends.selection import tail_error
from ditattn.backends.selection.tail_error import PER_BLOCK, QUERY_GROUPS, SUB_TOKENS, Forced, SubBlocks, estimate, pick, sub_blocks
from ditattn.ops.pooled_tail import PooledTail
from ditattn.plan.block_plan import BLOCK_SIZE
from ditattn.plan.bricks import brick_order
from ditattn.plan.token_order import TokenOrder, token_order
from sparse_calls import draw


def raster(length: int) -> TokenOrder:
    return token_order("raster", (1, 1, length))


def parts_of(q: Tensor, k: Tensor, v: Tensor, order: TokenOrder, lengths: Tensor | None = None) -> tuple[SubBlocks, SubBlocks, SubBlocks]:
    return sub_blocks(q, order), sub_blocks(k, order, lengths, variances=True), sub_blocks(v, order, lengths)


def plain_tail(key: SubBlocks, value: SubBlocks) -> PooledTail:
    """Plain means of the blocks."""
    (keys, counts), (values, _) = key.of_blocks(), value.of_blocks()
    return PooledTail(keys.transpose(1, 2), values.transpose(1, 2), counts)


def costs_of(parts: tuple[SubBlocks, SubBlocks, SubBlocks]) -> Tensor:
    return estimate(*parts, plain_tail(*parts[1:]), 0.3)


def spelled_out(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One head `[S, D]` in float64, group by group and block by block: `[M, N]`."""
    q, k, v = q.double(), k.double(), v.double()
    subs = [(len(x), x.mean(0), y.mean(0), x.var(0, correction=0)) for x, y in zip(k.split(SUB_TOKENS), v.split(SUB_TOKENS), strict=True)]
    whole = [(len(x), x.mean(0), y.mean(0)) for x, y in zip(k.split(BLOCK_SIZE), v.split(BLOCK_SIZE), strict=True)]
    costs = torch.zeros(-(-len(q) // BLOCK_SIZE), len(whole), dtype=torch.float64)
    for m, block in enumerate(q.split(BLOCK_SIZE)):
        groups = list(block.split(BLOCK_SIZE // QUERY_GROUPS))
        groups += [block] * (QUERY_GROUPS - len(groups))
        for group in groups:
            mean = group.mean(0)
            weights = [n * torch.exp(scale * mean @ key + scale**2 / 2 * mean.square() @ var) for n, key, _, var in subs]
            total = sum(weights)
            out = sum(w * value for w, (_, _, value, _) in zip(weights, subs, strict=True)) / total
            for j, (n, key, value) in enumerate(whole):
                mine = range(j * PER_BLOCK, min((j + 1) * PER_BLOCK, len(subs)))
                error = sum(weights[b] * (subs[b][2] - out) for b in mine) - n * torch.exp(scale * mean @ key) * (value - out)
                costs[m, j] += (error / total).square().sum() / QUERY_GROUPS
    return costs


@pytest.mark.parametrize("length", [256, 300, 517, 90])
def test_the_estimate_is_the_formula(length: int) -> None:
    q, k, v = (draw(2, length, heads, 32, seed=seed) for seed, heads in enumerate((4, 2, 2)))
    found = costs_of(parts_of(q, k, v, raster(length)))
    for b in range(2):
        for h in range(4):
            expected = spelled_out(q[b, :, h], k[b, :, h // 2], v[b, :, h // 2], 0.3)
            torch.testing.assert_close(found[b, h].double(), expected, rtol=2e-3, atol=1e-9)


def test_padded_keys_count_for_nothing() -> None:
    q, k, v = (draw(2, 517, 2, 32, seed=seed) for seed in range(3))
    lengths = torch.tensor([300, 517])
    k[0, 300:], v[0, 300:] = torch.nan, torch.inf
    found = costs_of(parts_of(q, k, v, raster(517), lengths))
    _, *short = parts_of(q[:1, :300], k[:1, :300], v[:1, :300], raster(300))
    alone = costs_of((sub_blocks(q[:1], raster(517)), *short))
    torch.testing.assert_close(found[:1, ..., :3], alone, rtol=1e-4, atol=1e-9)
    assert bool((found[0, ..., 3:] == 0).all())
    assert found.isfinite().all()


def test_orders_of_heads_are_followed() -> None:
    grid, x = (5, 16, 16), draw(1, 5 * 256, 2, 32)
    one, other = brick_order((4, 2, 16), grid), brick_order((1, 8, 16), grid)
    both = TokenOrder(
        torch.stack([one.forward, other.forward]), torch.stack([one.inverse, other.inverse]), one.first_frame, one.video, 1280
    )
    for lengths in (None, torch.tensor([1000])):
        found = sub_blocks(x, both, lengths)
        for head, order in enumerate((one, other)):
            alone = sub_blocks(x[:, :, head : head + 1], order, lengths)
            assert torch.allclose(found.means[:, head], alone.means[:, 0], atol=1e-6)


def test_a_block_of_equal_tokens_costs_nothing() -> None:
    """Its mean is each of its tokens; a block of unlike values with large scores costs most."""
    q, k, v = (draw(1, 512, 1, 32, seed=seed) for seed in range(3))
    k[:, 128:256], v[:, 128:256] = k[:, 128:129], v[:, 128:129]
    costs = costs_of(parts_of(q, k, v, raster(512)))
    assert float(costs[..., 1].max()) < 1e-9
    assert float(costs[..., [0, 2, 3]].min()) > 1e-6


def forced(columns: Tensor, rows: int) -> Forced:
    """Columns that every row keeps; no row keeps everything."""
    return Forced.of(columns, torch.zeros(rows, dtype=torch.bool), "cpu")


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 9), st.integers(4, 12), st.floats(0, 0.95), st.integers(0, 2))
def test_budgets_keep_their_exact_totals_and_floors(seed: int, heads: int, rows: int, columns: int, sparsity: float, sinks: int) -> None:
    costs = torch.rand(2, heads, rows, columns, generator=torch.Generator().manual_seed(seed)).mul(8).floor()
    kept = torch.arange(columns) < sinks
    mask = pick(costs, sparsity, forced(kept, rows), torch.ones(1, columns, dtype=torch.bool), 2)
    least = min(sinks + 2, columns)
    wanted = max(round(heads * rows * columns * (1 - sparsity)), heads * rows * least)
    assert mask.sum((1, 2, 3)).tolist() == [wanted] * 2
    assert int(mask.sum(-1).min()) >= least
    assert bool(mask[..., kept].all())


def test_rows_with_text_are_whole_and_no_part_of_the_budget() -> None:
    costs = torch.rand(1, 2, 8, 10)
    rows = torch.arange(8) == 7
    mask = pick(costs, 0.75, Forced.of(rows.new_zeros(10), rows, "cpu"), rows.new_ones(1, 10), 2)
    assert bool(mask[:, :, 7].all())
    assert int(mask[:, :, :7].sum()) == round(2 * 7 * 10 * 0.25)


def test_rows_may_all_be_whole() -> None:
    """Text and a grid without a block of its own."""
    rows = torch.ones(3, dtype=torch.bool)
    assert bool(pick(torch.rand(2, 1, 3, 3), 0.75, Forced.of(rows, rows, "cpu"), rows.unsqueeze(0), 2).all())


def test_a_planted_block_is_always_kept_and_empty_ones_never() -> None:
    costs = torch.rand(1, 4, 16, 16)
    costs[0, 1, 3, 9] = 50.0
    valid = torch.arange(16).unsqueeze(0) < 12
    mask = pick(costs, 0.9, forced(valid.new_zeros(16), 16), valid, 1)
    assert bool(mask[0, 1, 3, 9])
    assert not bool(mask[..., 12:].any())


def test_equal_costs_are_broken_by_index() -> None:
    mask = pick(
        torch.ones(1, 1, 2, 6),
        0.5,
        forced(torch.zeros(6, dtype=torch.bool), 2),
        torch.ones(1, 6, dtype=torch.bool),
        0,
    )
    assert mask.flatten().tolist() == [True] * 6 + [False] * 6


def test_nan_is_kept() -> None:
    costs = torch.rand(1, 1, 4, 8)
    costs[0, 0, 2] = torch.nan
    mask = pick(costs, 0.5, forced(torch.zeros(8, dtype=torch.bool), 4), torch.ones(1, 8, dtype=torch.bool), 1)
    assert bool(mask[0, 0, 2].all())


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [draw(1, 700, 4, 32, seed=seed) for seed in range(3)]
    index = torch.stack([torch.randperm(700, generator=torch.Generator().manual_seed(head)) for head in range(4)])
    for order in (raster(700), TokenOrder(index, index.argsort(-1), (0, 0), (0, 700), 700)):
        parts = parts_of(*drawn, order)
        before = costs_of(parts)
        with monkeypatch.context() as patch:
            patch.setattr(tail_error, "CHUNK", 1)
            again = parts_of(*drawn, order)
            assert torch.equal(again[1].variances, parts[1].variances)
            torch.testing.assert_close(costs_of(again), before)
