"""The antidiagonal estimate in plain torch, in fp32. The selection that asks for it picks the blocks itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ditattn.errors import UnsupportedCall
from ditattn.ops.contract import without_autocast
from ditattn.plan.block_plan import BLOCK_SIZE, num_blocks

__all__ = ["STRIDE", "estimate"]

STRIDE = 8
# 64 MiB of fp32 scores at a time
CHUNK_SCORES = 16 * 2**20


def estimate(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    stride: int = STRIDE,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """Estimated softmax mass of every block, fp32 `[B, H, M, N]`.

    A row sums to the number of folded queries in it: 16 for a full block of 128 at stride 8.

    Raises:
        UnsupportedCall: the stride does not divide the block size: a fold would belong to two blocks.
    """
    if stride < 1 or block_size % stride:
        raise UnsupportedCall(f"the stride must divide the block size of {block_size} tokens, {stride} does not")
    with without_autocast(query.device):
        return _estimate(query, key, scale, causal, key_lengths, stride, block_size)


def _estimate(query: Tensor, key: Tensor, scale: float, causal: bool, key_lengths: Tensor | None, stride: int, block_size: int) -> Tensor:
    batch, length, heads, _ = query.shape
    group = heads // key.shape[2]
    mass = query.new_zeros(batch, heads, num_blocks(length, block_size), num_blocks(key.shape[1], block_size), dtype=torch.float32)
    for b in range(batch):
        num_keys = None if key_lengths is None else key_lengths[b]
        for g in range(key.shape[2]):
            folded_key = _fold(_without_padding(key[b, :, g], num_keys), stride)
            for h in range(g * group, (g + 1) * group):
                folded_query = _fold(query[b, :, h], stride, reverse=True)
                mass[b, h] = _head_mass(folded_query, folded_key, scale / stride, causal, num_keys, stride, block_size // stride)
    return mass


def _without_padding(key: Tensor, num_keys: Tensor | None) -> Tensor:
    """Keys past the real ones set to 0: one of them may share a fold with real ones."""
    if num_keys is None:
        return key
    return key.masked_fill((torch.arange(key.shape[0], device=key.device) >= num_keys).unsqueeze(-1), 0.0)


def _fold(x: Tensor, stride: int, reverse: bool = False) -> Tensor:
    """`[S, D]` -> fp32 `[ceil(S / stride), stride * D]`, the tail padded with zeros."""
    groups = -(-x.shape[0] // stride)
    x = pad(x.float(), (0, 0, 0, groups * stride - x.shape[0])).view(groups, stride, x.shape[1])
    return (x.flip(1) if reverse else x).flatten(1)


def _head_mass(q: Tensor, k: Tensor, scale: float, causal: bool, num_keys: Tensor | None, stride: int, per_block: int) -> Tensor:
    """One head: folded queries `[S', stride * D]` and keys `[T', stride * D]` -> `[M, N]`; `per_block` folded tokens make a block."""
    rows = max(1, CHUNK_SCORES // (k.shape[0] * per_block)) * per_block
    column = torch.arange(k.shape[0], device=k.device)
    parts = []
    for start in range(0, q.shape[0], rows):
        scores = (q[start : start + rows] @ k.T) * scale
        if num_keys is not None:
            scores = scores.masked_fill(column * stride >= num_keys, -torch.inf)
        if causal:
            row = torch.arange(start, start + scores.shape[0], device=k.device)
            scores = scores.masked_fill(column > row.unsqueeze(1), -torch.inf)
        parts.append(_block_sums(scores.softmax(-1), per_block))
    return torch.cat(parts)


def _block_sums(weights: Tensor, per_block: int) -> Tensor:
    rows, columns = num_blocks(weights.shape[0], per_block), num_blocks(weights.shape[1], per_block)
    weights = pad(weights, (0, columns * per_block - weights.shape[1], 0, rows * per_block - weights.shape[0]))
    return weights.view(rows, per_block, columns, per_block).sum((1, 3))
