"""Dense attention through torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

CUDNN_MAJORS = (9, 10)


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


def run_cudnn(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, key_lengths: Tensor | None, attn_mask: Tensor | None
) -> Tensor:
    """As `run`, with only cuDNN's kernel allowed: it raises instead of falling back."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(query, key, value, scale, causal, None)


def why_not_cudnn() -> str | None:
    """Why cuDNN's attention cannot be had or does not pay on this machine's GPU, or None. Tried once on a small call."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.cuda is None or not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    major, minor = torch.cuda.get_device_capability()
    if major not in CUDNN_MAJORS:
        return f"cuDNN's attention pays on Hopper and data-centre Blackwell (compute capability 9 and 10), this GPU has {major}.{minor}"
    try:
        sample = torch.zeros(1, 128, 1, 128, dtype=torch.bfloat16, device="cuda")
        run_cudnn(sample, sample, sample, 1.0, False, None, None)
    except RuntimeError as error:
        return f"cuDNN refused a small call: {str(error).splitlines()[0]}"
    return None


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    if scale <= 0:
        # torch's FlashAttention for the CPU hides keys before it scales: -infinity times such a scale is NaN or +infinity
        query, scale = (-query, -scale) if scale else (query * 0, 1.0)
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
