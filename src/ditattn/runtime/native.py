"""Attention calls as the model made them, and as they run without us."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ditattn.ops import dense_attention as dense_op
from ditattn.ops.calls import DenseCall
from ditattn.ops.contract import check_qkv, checked_scale
from ditattn.ops.table import choose
from ditattn.runtime.key_padding import broadcastable

__all__ = ["asked", "native"]


def asked(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None) -> DenseCall:
    """The call as the model made it, its mask among it."""
    if query.ndim != 4 or key.ndim != 4:
        check_qkv(query, key, value)
    return DenseCall(query, key, value, checked_scale(scale, query.shape[3]), is_causal, attn_mask=attn_mask)


def native(call: DenseCall) -> Tensor:
    """What a call that is not ours to serve would have run without us: torch's SDPA."""
    check_qkv(call.query, call.key, call.value)
    if call.attn_mask is not None:
        call = replace(call, attn_mask=broadcastable(call.attn_mask))
    return dense_op.compute(call, choose(dense_op.TABLE, call.facts(), ("torch",)))
