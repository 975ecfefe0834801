"""The dropped mass of a plan against a softmax that is computed whole, in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ditattn.backends.block_sparse_attn import BlockSparseAttentionBackend
from ditattn.backends.torch_sdpa import TorchSDPAImpl
from ditattn.plan.block_plan import BlockPlan
from ditattn.plan.bricks import brick_order
from ditattn.plan.token_order import TokenOrder, token_order
from ditattn.runtime import probe


def per_head(grid):
    """Bricks of two shapes, one for each key head."""
    one, other = (brick_order(brick, grid, 0, 5) for brick in ((1, 8, 16), (2, 4, 16)))
    return TokenOrder(torch.stack([one.forward, other.forward]), torch.stack([one.inverse, other.inverse]), one.first_frame, one.video, 405)


@pytest.mark.parametrize("order", ["raster", "tile", "per head"])
@pytest.mark.parametrize("padded", [False, True])
def test_dropped_mass_is_that_of_the_whole_softmax(order, padded, monkeypatch):
    monkeypatch.setattr(probe, "MASS_ROWS", 10_000)
    grid, heads, groups, scale = (2, 10, 20), 4, 2, 0.2
    tokens = grid[0] * grid[1] * grid[2] + 5
    query = torch.randn(2, tokens, heads, 32)
    key = torch.randn(2, tokens, groups, 32)
    lengths = torch.tensor([tokens - 3, tokens]) if padded else None
    mask = torch.rand(2, heads, 4, 4) > 0.5
    plan = BlockPlan.from_mask(mask, tokens, tokens)

    permutation = per_head(grid) if order == "per head" else token_order(order, grid, 0, 5, query.device)
    q = permutation.apply(query).double()
    k = permutation.apply(key).double().repeat_interleave(heads // groups, dim=2)
    scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
    if lengths is not None:
        scores = scores.masked_fill(torch.arange(tokens) >= lengths.view(-1, 1, 1, 1), -torch.inf)
    kept = mask.repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, :tokens, :tokens]
    expected = (scores.softmax(-1) * ~kept).sum(-1).mean()
    assert float(probe.dropped_mass(query, key, plan, permutation, scale, lengths)) == pytest.approx(float(expected), rel=1e-4)


def test_a_layer_that_is_called_with_two_scales_is_tried_with_both():
    tried = probe.SparseProbe([])
    model = SimpleNamespace(name="transformer", backend=BlockSparseAttentionBackend)
    calls = [
        SimpleNamespace(layer=0, impl=TorchSDPAImpl(2, 32, scale, causal)) for scale, causal in ((0.1, False), (0.2, False), (0.2, True))
    ]
    impls = [tried._impl_of(0, model, call) for call in calls]
    assert [(impl.softmax_scale, impl.causal) for impl in impls] == [(0.1, False), (0.2, False), (0.2, True)]
    assert tried._impl_of(0, model, calls[0]) is impls[0]
