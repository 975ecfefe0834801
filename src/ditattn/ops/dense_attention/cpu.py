"""Dense attention through the compiled CPU kernel: the plan that keeps everything."""

from __future__ import annotations

from torch import Tensor

from ditattn.ops import cpu_call
from ditattn.ops.calls import DenseCall


def run(call: DenseCall) -> Tensor:
    return _by_parts(call, 0)


def run_fast_fp32(call: DenseCall) -> Tensor:
    """As `run`, multiplying fp32 tensors as bf16."""
    return _by_parts(call, 1)


def run_sequential(call: DenseCall) -> Tensor:
    """As `run`, on a tile unit by the sequential schedule."""
    return _by_parts(call, 0, False)


def run_overlapped(call: DenseCall) -> Tensor:
    """As `run`, on a tile unit by the overlapped schedule."""
    return _by_parts(call, 0, True)


def run_bf16x3(call: DenseCall) -> Tensor:
    """As `run`, forming products of fp32 tensors from two bf16 parts of each number."""
    return _by_parts(call, 2)


def run_bf16x6(call: DenseCall) -> Tensor:
    """As `run`, forming products of fp32 tensors from three bf16 parts of each number."""
    return _by_parts(call, 3)


def _by_parts(call: DenseCall, bf16_parts: int, overlapped: bool | None = None) -> Tensor:
    assert call.attn_mask is None, "the table refuses calls with a mask"
    return cpu_call.attention(call, bf16_parts=bf16_parts, overlapped=overlapped)[0]
