"""BlockPlan: round trips, invariants and density on generated plans; `check` finds each kind of violation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from ditattn.errors import UnsupportedCall
from ditattn.plan.block_plan import BlockPlan, num_blocks


@st.composite
def masks(draw: st.DrawFn) -> tuple[torch.Tensor, int, int, int]:
    """A block mask with its token lengths and block size."""
    size = draw(st.sampled_from([1, 3, 16, 128]))
    query_length, key_length = draw(st.integers(1, 6 * size)), draw(st.integers(1, 6 * size))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), num_blocks(query_length, size), num_blocks(key_length, size))
    share = draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.rand(shape, generator=generator) < share, query_length, key_length, size


@given(masks())
def test_mask_round_trip(given_mask: tuple[torch.Tensor, int, int, int]) -> None:
    mask = given_mask[0]
    plan = BlockPlan.from_mask(*given_mask)
    assert torch.equal(plan.to_mask(), mask)
    assert torch.equal(plan.trimmed().to_mask(), mask)


@given(masks())
def test_plans_from_masks_keep_every_invariant(given_mask: tuple[torch.Tensor, int, int, int]) -> None:
    mask = given_mask[0]
    plan = BlockPlan.from_mask(*given_mask)
    for each in (plan, plan.trimmed()):
        each.check(*mask.shape[:2])
        each.check(mask.shape[0] if mask.shape[0] > 1 else 5, mask.shape[1] if mask.shape[1] > 1 else 7)
    assert torch.equal(plan.counts.long(), mask.sum(-1))
    assert plan.trimmed().indices.shape[-1] == max(1, int(plan.counts.max()))


@given(masks())
def test_density_counts_real_pairs(given_mask: tuple[torch.Tensor, int, int, int]) -> None:
    plan = BlockPlan.from_mask(*given_mask)
    tokens = oracle.token_mask(plan, *given_mask[0].shape[:2])
    assert plan.density() == pytest.approx(tokens.double().mean().item(), abs=1e-12)
    assert plan.trimmed().density() == pytest.approx(plan.density(), abs=1e-12)


@given(st.integers(1, 700), st.integers(1, 700))
def test_full_plan(query_length: int, key_length: int) -> None:
    plan = BlockPlan.full(query_length, key_length)
    plan.check(3, 4)
    assert plan.density() == 1.0
    assert bool(plan.to_mask().all())


@given(st.integers(1, 10**6), st.integers(1, 300))
def test_num_blocks_covers_without_an_empty_tail(num_tokens: int, size: int) -> None:
    blocks = num_blocks(num_tokens, size)
    assert (blocks - 1) * size < num_tokens <= blocks * size


def good_plan() -> BlockPlan:
    """M = 3, N = 4, one row empty."""
    mask = torch.tensor([[True, False, True, False], [False] * 4, [True, True, False, True]]).expand(2, 2, 3, 4)
    return BlockPlan.from_mask(mask, 300, 400)


def _with_index(position: tuple[int, ...], value: int) -> BlockPlan:
    plan = good_plan()
    plan.indices[position] = value
    return plan


def _with_count(position: tuple[int, ...], value: int) -> BlockPlan:
    plan = good_plan()
    plan.counts[position] = value
    return plan


VIOLATIONS = {
    "indices not int32": (lambda: replace(good_plan(), indices=good_plan().indices.long()), "int32"),
    "counts not int32": (lambda: replace(good_plan(), counts=good_plan().counts.long()), "int32"),
    "no query tokens": (lambda: replace(good_plan(), query_length=0), "positive"),
    "no key tokens": (lambda: replace(good_plan(), key_length=0), "positive"),
    "block size 0": (lambda: replace(good_plan(), block_size=0), "positive"),
    "two devices": (lambda: replace(good_plan(), counts=good_plan().counts.to("meta")), "on one device, not on cpu and meta"),
    "counts shape": (lambda: replace(good_plan(), counts=good_plan().counts[:, :1]), r"\[B, H, M\]"),
    "three axes": (lambda: replace(good_plan(), indices=good_plan().indices[0], counts=good_plan().counts[0]), r"\[B, H, M, K\]"),
    "rows": (lambda: replace(good_plan(), query_length=129), "3 rows for 2 query blocks"),
    "no columns": (lambda: replace(good_plan(), indices=good_plan().indices[..., :0]), "at least one column"),
    "negative count": (lambda: _with_count((0, 1, 2), -1), "counts must lie in 0..4"),
    "count beyond the columns": (lambda: _with_count((1, 0, 0), 5), "counts must lie in 0..4"),
    "unused entry": (lambda: _with_index((0, 0, 1, 0), 2), "past a row's count"),
    "index too large": (lambda: _with_index((1, 1, 2, 2), 4), r"must lie in 0..3"),
    "index negative": (lambda: _with_index((1, 1, 0, 0), -1), r"must lie in 0..3"),
    "repeated": (lambda: _with_index((0, 1, 2, 1), 0), "ascend"),
    "descending": (lambda: _with_index((0, 1, 2, 0), 2), "ascend"),
}


@pytest.mark.parametrize("what", VIOLATIONS)
def test_check_finds(what: str) -> None:
    spoiled, text = VIOLATIONS[what]
    with pytest.raises(UnsupportedCall, match=text):
        spoiled().check(2, 2)


def test_check_compares_batch_and_heads() -> None:
    good_plan().check(2, 2)
    for batch, heads in ((3, 2), (2, 3), (1, 2)):
        with pytest.raises(UnsupportedCall, match="B, H"):
            good_plan().check(batch, heads)


@pytest.mark.parametrize("shape", [(3, 4), (1, 1, 3, 3), (1, 1, 2, 4)])
def test_masks_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedCall, match=r"\[B, H, 3, 4\]"):
        BlockPlan.from_mask(torch.ones(shape, dtype=torch.bool), 300, 400)
