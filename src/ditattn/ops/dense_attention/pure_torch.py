"""Dense attention through torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def run(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, key_lengths: Tensor | None, attn_mask: Tensor | None
) -> Tensor:
    mask = _merged_mask(query, key, causal, key_lengths, attn_mask)
    out = _sdpa(query, key, value, scale, causal and mask is None, mask)
    if key_lengths is None:
        return out
    # SDPA leaves a row without keys undefined; the contract says zeros
    return torch.where(key_lengths.view(-1, 1, 1, 1) > 0, out, 0)


def run_flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, key_lengths: Tensor | None, attn_mask: Tensor | None
) -> Tensor:
    """As `run`, with only torch's own FlashAttention kernel allowed: it raises instead of falling back."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _sdpa(query, key, value, scale, causal, None)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    # no fused kernel of torch takes a strided last axis
    q, k, v = ((x if x.stride(3) == 1 else x.contiguous()).transpose(1, 2) for x in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=query.shape[2] != key.shape[2])
    return out.transpose(1, 2)


def _merged_mask(query: Tensor, key: Tensor, causal: bool, key_lengths: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
    """One mask for all three kinds, or None where SDPA needs none. SDPA refuses a mask beside is_causal."""
    if key_lengths is None and attn_mask is None:
        return None
    keep: Tensor | None = None
    if key_lengths is not None:
        keep = torch.arange(key.shape[1], device=key.device) < key_lengths.view(-1, 1, 1, 1)
    if causal:
        triangle = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device).tril()
        keep = triangle if keep is None else keep & triangle
    if attn_mask is None:
        return keep
    if attn_mask.dtype == torch.bool:
        return attn_mask if keep is None else attn_mask & keep
    attn_mask = attn_mask.to(query.dtype)
    return attn_mask if keep is None else attn_mask.masked_fill(~keep, -torch.inf)
