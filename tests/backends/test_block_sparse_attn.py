"""block_sparse_attn beyond what both sparse backends share."""

from __future__ import annotations

import pytest
import torch

import judge
import oracle
from ditattn.backends.block_sparse_attn import BlockSparseAttentionBackend
from ditattn.errors import ConfigError
from sparse_calls import call, draw

GRID = (3, 24, 20)


def test_first_frame_blocks_are_the_frame_stride() -> None:
    q, k, v = (draw(1, 3 * 24 * 20, 1, 32, seed=i) for i in range(3))
    _, record = call(BlockSparseAttentionBackend, q, k, v, GRID, sparsity=0.9)
    stride = -(-24 * 20 // 128)
    mask = record.plan.to_mask()[0, 0]
    assert bool(mask[:stride].all() and mask[:, :stride].all())
    assert not bool(mask[stride].all() or mask[:, stride].all())


def test_causal() -> None:
    q, k, v = (draw(1, 3 * 24 * 20, 2, 32, seed=i) for i in range(3))
    out, record = call(BlockSparseAttentionBackend, q, k, v, GRID, causal=True, sparsity=0.6)
    assert record.reason is None
    assert not bool(record.plan.to_mask().triu(1).any())
    assert judge.relative_error(out, oracle.attention(q, k, v, plan=record.plan, causal=True)[0]) < 2e-6


def test_causal_does_not_look_ahead() -> None:
    """Changing the last third of the tokens leaves the outputs before it alone."""
    q, k, v = (draw(1, 3 * 24 * 20, 1, 32, seed=i) for i in range(3))
    before, _ = call(BlockSparseAttentionBackend, q, k, v, GRID, causal=True, first_frame_sink=False)
    for x in (q, k, v):
        x[:, 960:] = 3.0
    after, _ = call(BlockSparseAttentionBackend, q, k, v, GRID, causal=True, first_frame_sink=False)
    # 896 is the last block boundary before the change
    assert torch.equal(before[:, :896], after[:, :896])


def test_causal_in_tile_order_is_refused() -> None:
    q = draw(1, 3 * 24 * 20, 1, 32)
    with pytest.raises(ConfigError, match="token_order='raster'"):
        call(BlockSparseAttentionBackend, q, q, q, GRID, causal=True, token_order="tile")


def test_a_lower_threshold_keeps_less() -> None:
    q, k, v = (3 * draw(1, 3 * 24 * 20, 1, 32, seed=i) for i in range(3))
    densities = [
        call(BlockSparseAttentionBackend, q, k, v, GRID, sparsity=0.1, threshold=t, first_frame_sink=False)[1].plan.density()
        for t in (1.0, 0.8, 0.4)
    ]
    assert densities[0] > densities[1] > densities[2]


def test_counts_follow_the_edited_mask() -> None:
    """Adding the first frame after the estimate must be counted: the original's kernel trusts its count table."""
    q, k, v = (draw(1, 3 * 24 * 20, 2, 32, seed=i) for i in range(3))
    _, record = call(BlockSparseAttentionBackend, q, k, v, GRID, sparsity=0.9)
    assert torch.equal(record.plan.counts, record.plan.to_mask().sum(-1, dtype=torch.int32))
