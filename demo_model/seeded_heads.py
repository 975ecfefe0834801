"""A head start for self-attention: heads begin as taps of a 3-D convolution.

A constant bias of q and k, turned by the rotary embedding, gives a logit that depends on the relative position alone; turning
the q bias by an offset puts the peak there. The locality that follows is seeded, not learned: say so wherever it is shown.
"""

from typing import Any

import torch

# (frames, rows, columns) that a head first looks at, by layer and head; None leaves a head without a place of its own
OFFSETS: tuple[tuple[tuple[int, int, int] | None, ...], ...] = (
    ((0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1)),
    ((-1, 0, 0), (1, 0, 0), None, None),
    ((0, -2, 0), (0, 2, 0), (0, 0, -2), (0, 0, 2)),
    ((-2, 0, 0), (2, 0, 0), None, None),
)
NUM_FREQUENCIES = 4
BIAS_STRENGTH = 2.0
CONTENT_FACTOR = 0.6
NORM_GAIN = 1.6


def _tap_biases(axis_dims: tuple[int, int, int], offset: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Biases of q and k, each [D], whose rotated product peaks where the key lies at `offset` from the query."""
    head_dim, base = sum(axis_dims), 0
    q_bias, k_bias = torch.zeros(head_dim), torch.zeros(head_dim)
    for dim, shift in zip(axis_dims, offset, strict=True):
        # the highest frequencies of this axis
        freqs = 10000.0 ** (-torch.arange(0, dim, 2)[:NUM_FREQUENCIES].float() / dim)
        pairs = base + 2 * torch.arange(NUM_FREQUENCIES)
        k_bias[pairs] = 1.0
        q_bias[pairs], q_bias[pairs + 1] = torch.cos(shift * freqs), torch.sin(shift * freqs)
        base += dim
    return q_bias, k_bias


@torch.no_grad()
def seed_heads(transformer: Any) -> None:
    """Change the q and k projections of self-attention in place, as the module says."""
    rope, head_dim = transformer.rope, transformer.config.attention_head_dim
    axis_dims = (rope.t_dim, rope.h_dim, rope.w_dim)
    for layer, block in enumerate(transformer.blocks):
        attn = block.attn1
        attn.norm_q.weight.mul_(NORM_GAIN)
        attn.norm_k.weight.mul_(NORM_GAIN)
        for head, offset in enumerate(OFFSETS[layer % len(OFFSETS)][: transformer.config.num_attention_heads]):
            if offset is None:
                continue
            rows = slice(head * head_dim, (head + 1) * head_dim)
            for projection, bias in zip((attn.to_q, attn.to_k), _tap_biases(axis_dims, offset), strict=True):
                projection.weight[rows] *= CONTENT_FACTOR
                projection.bias[rows] += BIAS_STRENGTH * bias
