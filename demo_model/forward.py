"""A functional forward of `WanTransformer3DModel` over its own weights, for training.

It differs from the stock forward in two ways: frames may carry any true time, so a batch can hold frames 0, 4 and 8 of a clip;
and text padding is one zero key with the bias log(n), which equals n zero keys.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
MASKED = -1e4
LONGEST_PLAIN = 512
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def rotary_tables(rope: Any, frames: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [1, S, 1, D/2] in bf16, for tokens of `rows` x `columns` at the int64 times `frames` [T]."""
    tables = []
    for table, lane in ((rope.freqs_cos, 0), (rope.freqs_sin, 1)):
        t, y, x = table.split([rope.t_dim, rope.h_dim, rope.w_dim], dim=1)
        grid = (len(frames), rows, columns, -1)
        parts = [t[frames][:, None, None].expand(grid), y[:rows][None, :, None].expand(grid), x[:columns][None, None].expand(grid)]
        # every angle is stored twice, for the two members of its pair
        tables.append(torch.cat(parts, -1).flatten(0, 2)[None, :, None, lane::2].to(torch.bfloat16))
    return tables[0], tables[1]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the interleaved pairs of x [B, S, H, D]."""
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.view(*x.shape[:2], num_heads, -1)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS).to(x.dtype) * weight.to(x.dtype)


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of q [B, H, S, D] to k, v [B, H, T, D]; few keys as plain products, whose backward is the faster one on a CPU."""
    if k.shape[2] > LONGEST_PLAIN:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]))
    return (scores if bias is None else scores + bias).softmax(-1).to(v.dtype) @ v


def _self_attention(attn: Any, x: Tensor, rotary: tuple[Tensor, Tensor], num_heads: int, attend: Attend) -> Tensor:
    q = rotate(_split_heads(_rms_norm(attn.to_q(x), attn.norm_q.weight), num_heads), *rotary)
    k = rotate(_split_heads(_rms_norm(attn.to_k(x), attn.norm_k.weight), num_heads), *rotary)
    v = _split_heads(attn.to_v(x), num_heads)
    out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    projected: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2))
    return projected


def _cross_attention(attn: Any, x: Tensor, text: Tensor, text_bias: Tensor, num_heads: int) -> Tensor:
    q = _split_heads(_rms_norm(attn.to_q(x), attn.norm_q.weight), num_heads).transpose(1, 2)
    k = _split_heads(_rms_norm(attn.to_k(text), attn.norm_k.weight), num_heads).transpose(1, 2)
    v = _split_heads(attn.to_v(text), num_heads).transpose(1, 2)
    out = plain_attention(q, k, v, text_bias)
    projected: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2))
    return projected


def run_block(
    block: Any, x: Tensor, modulation: Tensor, text: Tensor, text_bias: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend
) -> Tensor:
    """One transformer block on x [B, S, C]; modulation [B, 6, C]; text [B, L, C]; text_bias [B, 1, 1, L]."""
    num_heads = block.attn1.heads
    table: Tensor = block.scale_shift_table
    shift1, scale1, gate1, shift2, scale2, gate2 = (table + modulation).to(x.dtype).chunk(6, 1)
    x = x + _self_attention(block.attn1, _layer_norm(x) * (1 + scale1) + shift1, rotary, num_heads, attend) * gate1
    norm = F.layer_norm(x, x.shape[-1:], block.norm2.weight.to(x.dtype), block.norm2.bias.to(x.dtype), EPS)
    x = x + _cross_attention(block.attn2, norm, text, text_bias, num_heads)
    hidden = F.gelu(block.ffn.net[0].proj(_layer_norm(x) * (1 + scale2) + shift2), approximate="tanh")
    x = x + block.ffn.net[2](hidden) * gate2
    return x


def _patchify(x: Tensor) -> Tensor:
    """[B, C, T, Y, X] to tokens [B, T Y/2 X/2, 4 C]."""
    B, C, T, Y, X = x.shape
    return x.view(B, C, T, Y // 2, 2, X // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def _unpatchify(x: Tensor, shape: torch.Size) -> Tensor:
    """Tokens [B, T Y/2 X/2, 4 C] to `shape` [B, C, T, Y, X]."""
    B, C, T, Y, X = shape
    return x.view(B, T, Y // 2, X // 2, 2, 2, C).permute(0, 6, 1, 2, 4, 3, 5).reshape(shape)


def _embed_text(encoder: Any, ids: Tensor, mask: Tensor, num_pad: float) -> tuple[Tensor, Tensor]:
    """Word embeddings with one zero key at the end [B, L+1, 64], and the bias of the keys [B, 1, 1, L+1]."""
    text = encoder(ids, mask).last_hidden_state * mask[..., None]
    bias = torch.where(mask > 0, 0.0, MASKED)
    return F.pad(text, (0, 0, 0, 1)), F.pad(bias, (0, 1), value=math.log(num_pad))[:, None, None]


def velocity(
    transformer: Any,
    encoder: Any,
    x: Tensor,
    sigma: Tensor,
    ids: Tensor,
    mask: Tensor,
    num_pad: float,
    frames: Tensor,
    attend: Attend = plain_attention,
    hidden: list[Tensor] | None = None,
) -> Tensor:
    """Predict noise - clean for noisy latents.

    x [B, 12, T, Y, X]; sigma [B] in 0..1; ids and mask [B, L] of the captions; num_pad counts the zero keys behind the text;
    frames [T] int64 are true times; attend serves self-attention, layer by layer, on q, k, v [B, H, S, D]. To a list given as `hidden`
    the output [B, S, C] of every block is added. Matrix products run in bf16, the result is fp32 [B, 12, T, Y, X].
    """
    embed = transformer.condition_embedder
    text, text_bias = _embed_text(encoder, ids, mask, num_pad)
    time = embed.time_embedder(embed.timesteps_proj(sigma * 1000))
    modulation = embed.time_proj(F.silu(time)).unflatten(1, (6, -1))
    text = embed.text_embedder(text).to(torch.bfloat16)
    rotary = rotary_tables(transformer.rope, frames, x.shape[3] // 2, x.shape[4] // 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        patch = transformer.patch_embedding
        h = F.linear(_patchify(x.to(torch.bfloat16)), patch.weight.flatten(1), patch.bias)
        for block in transformer.blocks:
            h = run_block(block, h, modulation, text, text_bias.to(torch.bfloat16), rotary, attend)
            if hidden is not None:
                hidden.append(h)
        shift, scale = (transformer.scale_shift_table + time[:, None]).to(h.dtype).chunk(2, 1)
        return _unpatchify(transformer.proj_out(_layer_norm(h) * (1 + scale) + shift).float(), x.shape)
