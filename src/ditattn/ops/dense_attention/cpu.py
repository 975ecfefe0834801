"""Dense attention through the compiled CPU kernel: the plan that keeps everything."""

from __future__ import annotations

from torch import Tensor

from ditattn.ops import cpu_call
from ditattn.ops.calls import DenseCall


def run(call: DenseCall) -> Tensor:
    assert call.attn_mask is None, "the table refuses calls with a mask"
    return cpu_call.attention(call)[0]


def run_fast_fp32(call: DenseCall) -> Tensor:
    """As `run`, multiplying fp32 tensors as bf16."""
    assert call.attn_mask is None, "the table refuses calls with a mask"
    return cpu_call.attention(call, fast_fp32=True)[0]
