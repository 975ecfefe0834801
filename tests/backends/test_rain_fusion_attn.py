"""rain_fusion_attn beyond what both sparse backends share."""

from __future__ import annotations

import pytest
import torch

from ditattn.backends.rain_fusion_attn import RainFusionAttentionBackend, RainFusionAttentionImpl
from ditattn.plan.block_plan import num_kept
from ditattn.plan.token_order import token_order
from sparse_calls import call, draw


def test_causal_is_refused() -> None:
    with pytest.raises(ValueError, match="does not support causal"):
        RainFusionAttentionImpl(2, 64, None, True)


@pytest.mark.parametrize("grid", [(3, 24, 20), (5, 16, 16), (2, 30, 52)])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
def test_every_row_keeps_the_asked_number_and_the_first_frame(grid: tuple[int, int, int], sparsity: float) -> None:
    length = grid[0] * grid[1] * grid[2]
    q, k, v = (draw(2, length, 2, 32, seed=i) for i in range(3))
    _, record = call(RainFusionAttentionBackend, q, k, v, grid, sparsity=sparsity)
    protected = token_order("tile", grid).protected_blocks(128, True, "cpu")
    blocks = protected.numel()
    mask = record.plan.to_mask()
    assert bool(mask[..., protected, :].all() and mask[..., protected].all())
    top = num_kept(blocks, sparsity)
    free_rows = record.plan.counts[..., ~protected]
    assert bool(((free_rows >= max(top, int(protected.sum()))) & (free_rows <= top + int(protected.sum()))).all())
    # without the first frame the number is exact
    _, record = call(RainFusionAttentionBackend, q, k, v, grid, sparsity=sparsity, first_frame_sink=False)
    assert bool((record.plan.counts == top).all())


@pytest.mark.parametrize(
    ("grid", "sparsity", "low", "high"),
    [((21, 30, 52), 0.8, 0.244, 0.292), ((21, 30, 52), 0.5, 0.525, 0.574), ((31, 22, 40), 0.9, 0.132, 0.164)],
)
def test_realised_density_of_real_shapes(grid: tuple[int, int, int], sparsity: float, low: float, high: float) -> None:
    """Density counts the first frame: the closed form for Wan's shapes, between fully overlapping and fully disjoint."""
    length = grid[0] * grid[1] * grid[2]
    q, k = draw(1, length, 1, 32), draw(1, length, 1, 32, seed=1)
    metadata = RainFusionAttentionBackend.get_builder_cls()().build(
        current_timestep=20, raw_latent_shape=(1, 4, *grid), patch_size=1, sparsity=sparsity
    )
    order = token_order("tile", grid)
    plan = RainFusionAttentionImpl(1, 32).plan(q, k, metadata, order, order.protected_blocks(128, True, "cpu"))
    # one block of slack: the closed form counts whole blocks
    slack = 1 / plan.num_key_blocks
    assert low - slack <= plan.density() <= high + slack


def test_tiles_gather_what_raster_tears_apart() -> None:
    """Keys that matter stand in one 8x16 patch of a frame: in tile order one block holds them, in raster order they lie in several."""
    grid = (1, 32, 32)
    q, k, v = (0.01 * draw(1, 1024, 1, 32, seed=i) for i in range(3))
    patch = torch.zeros(32, 32, dtype=torch.bool)
    patch[8:16, 0:16] = True
    k[:, patch.flatten()] += 5.0
    q += 5.0
    dense, _ = call(RainFusionAttentionBackend, q, k, v, grid, sparsity=0.0)
    errors = {}
    for order in ("tile", "raster"):
        out, _ = call(RainFusionAttentionBackend, q, k, v, grid, sparsity=0.875, token_order=order)
        errors[order] = float((out - dense).norm() / dense.norm())
    assert errors["tile"] < 1e-3 < errors["raster"]
