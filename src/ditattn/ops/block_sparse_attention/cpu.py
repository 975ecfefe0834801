"""Block-sparse attention through the compiled CPU kernel, which applies a token order while it packs and writes: no copy is made for it."""

from __future__ import annotations

from torch import Tensor

from ditattn.ops import cpu_call
from ditattn.ops.calls import SparseCall


def run(call: SparseCall) -> tuple[Tensor, Tensor | None]:
    return cpu_call.attention(call)


def run_fast_fp32(call: SparseCall) -> tuple[Tensor, Tensor | None]:
    """As `run`, multiplying fp32 tensors as bf16."""
    return cpu_call.attention(call, bf16_parts=1)


def run_sequential(call: SparseCall) -> tuple[Tensor, Tensor | None]:
    """As `run`, on a tile unit by the sequential schedule."""
    return cpu_call.attention(call, overlapped=False)


def run_overlapped(call: SparseCall) -> tuple[Tensor, Tensor | None]:
    """As `run`, on a tile unit by the overlapped schedule."""
    return cpu_call.attention(call, overlapped=True)


def run_bf16x3(call: SparseCall) -> tuple[Tensor, Tensor | None]:
    """As `run`, forming products of fp32 tensors from two bf16 parts of each number."""
    return cpu_call.attention(call, bf16_parts=2)


def run_bf16x6(call: SparseCall) -> tuple[Tensor, Tensor | None]:
    """As `run`, forming products of fp32 tensors from three bf16 parts of each number."""
    return cpu_call.attention(call, bf16_parts=3)
