"""Dense attention through torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ditattn.ops.calls import DenseCall
from ditattn.ops.table import CallFacts

CUDNN_MAJORS = (9, 10)
LOAD_BYTES = 16


def run(call: DenseCall) -> Tensor:
    out = _sdpa(call, _merged_mask(call))
    if call.key_lengths is None:
        return out
    # SDPA leaves a row without keys undefined; the contract says zeros
    return torch.where(call.key_lengths.view(-1, 1, 1, 1) > 0, out, 0)


def run_flash(call: DenseCall) -> Tensor:
    """As `run`, with only torch's own FlashAttention kernel allowed: it raises instead of falling back."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _sdpa(call)


def run_cudnn(call: DenseCall) -> Tensor:
    """As `run`, with only cuDNN's kernel allowed: it raises instead of falling back."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(call)


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
        run_cudnn(DenseCall(sample, sample, sample, 1.0))
    except RuntimeError as error:
        return f"cuDNN refused a small call: {str(error).splitlines()[0]}"
    return None


def limits_of_cudnn(facts: CallFacts) -> str | None:
    return "does not take a single key" if facts.num_keys == 1 else None


def limits_of_flash(facts: CallFacts) -> str | None:
    if facts.device == "cuda" and {"causal", "unequal_lengths"} <= facts.needs:
        return "on cuda it does not take causal calls with more keys than queries, or fewer"
    return None


def _sdpa(call: DenseCall, mask: Tensor | None = None) -> Tensor:
    """`mask` stands for all that the call hides; without one, SDPA is told whether the call is causal."""
    query, scale = positively_scaled(call.query, call.scale)
    if _overlaps(query):
        # torch's kernel for the CPU gives its result the strides of the query, and writes it over itself
        query = query.contiguous()
    q, k, v = ((x if _readable(x) else x.contiguous()).transpose(1, 2) for x in (query, call.key, call.value))
    # SDPA wants the last two axes, also of a mask that is the same for all queries
    mask = None if mask is None else torch.atleast_2d(mask)
    options = {"is_causal": call.causal and mask is None, "enable_gqa": q.shape[1] != k.shape[1]}
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, **options).transpose(1, 2)


def positively_scaled(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores by a scale above zero.

    torch's FlashAttention, on CPUs and GPUs, hides keys before it scales: -infinity times another scale is NaN or +infinity.
    """
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale else (query * 0, 1.0)


def _readable(x: Tensor) -> bool:
    """True if every fused kernel of torch reads `[B, S, H, D]` where it lies.

    None takes a strided last axis. Those for CUDA load 16 bytes at a time: at other addresses they fail, or read what lies beside a view.
    """
    if x.stride(3) != 1:
        return False
    if x.device.type != "cuda":
        return True
    size = x.element_size()
    return x.data_ptr() % LOAD_BYTES == 0 and all(stride * size % LOAD_BYTES == 0 for stride in x.stride()[:3])


def _overlaps(x: Tensor) -> bool:
    """True if two places of a tensor may be one in memory, as after `expand`."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _merged_mask(call: DenseCall) -> Tensor | None:
    """One mask for all three kinds, or None where SDPA needs none. SDPA refuses a mask beside is_causal."""
    query, key, attn_mask = call.query, call.key, call.attn_mask
    if call.key_lengths is None and attn_mask is None:
        return None
    keep: Tensor | None = None
    if call.key_lengths is not None:
        keep = torch.arange(key.shape[1], device=key.device) < call.key_lengths.view(-1, 1, 1, 1)
    if call.causal:
        triangle = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device).tril()
        keep = triangle if keep is None else keep & triangle
    if attn_mask is None:
        return keep
    if attn_mask.dtype == torch.bool:
        return attn_mask if keep is None else attn_mask & keep
    attn_mask = attn_mask.to(query.dtype)
    return attn_mask if keep is None else attn_mask.masked_fill(~keep, -torch.inf)
