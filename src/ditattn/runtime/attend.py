"""The attention of the running forward as operations that torch.compile does not look into."""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch
from torch import Tensor

from ditattn.errors import UnsupportedCall
from ditattn.ops.contract import refuse_gradients
from ditattn.runtime.autocast import autocast_as_sdpa
from ditattn.runtime.foreign_modes import native_sdpa, why_native
from ditattn.runtime.forward import running
from ditattn.runtime.native import asked, native

__all__ = ["attend"]

logger = logging.getLogger("ditattn")

_local = threading.local()


@torch.library.custom_op("ditattn::attend", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    forward = running()
    if forward is None:
        _warn_stray()
        return native(asked(query, key, value, attn_mask, is_causal, scale))
    if forward.look is not None:
        return forward.look(forward, query, key, value)
    return forward.stage.attend(forward, query, key, value, attn_mask, is_causal, scale)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    return query.new_empty(query.shape)


_attend.register_autograd(refuse_gradients)


@torch.library.custom_op("ditattn::count_native", mutates_args=())
def _count_native(out: Tensor, query: Tensor, key: Tensor, reason: str) -> Tensor:
    """The output of a call that was torch's own, counted when it runs: a compiled graph runs no Python of ours."""
    forward = running()
    if forward is not None and forward.look is None:
        forward.stage.count_native(forward, query, key, reason)
    return out.clone()


@_count_native.register_fake
def _(out: Tensor, query: Tensor, key: Tensor, reason: str) -> Tensor:
    return torch.empty_like(out)


# the output passes through
_count_native.register_autograd(lambda context, gradient: (gradient, None, None, None))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of the denoiser forward that runs in this thread, `[B, S, H, D]` in and out, as one opaque operation for torch.compile.

    Step, branch, grid and layer are read inside the operation, so that a compiled graph stays right from step to step. Where a
    torch-function mode of somebody else is active (guidance that perturbs attention), the call is torch's SDPA, which that mode sees.

    Raises:
        UnsupportedCall: dropout, or a mask that is no tensor.
        DenseInStrictMode: see DenoisingStage.
    """
    if dropout_p:
        raise UnsupportedCall(f"attention dropout is for training; this package is forward only (got dropout_p={dropout_p})")
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise UnsupportedCall(f"a mask must be a tensor, not {type(attn_mask).__name__}")
    reason = why_native()
    if reason is not None:
        passed_on: Tensor = _count_native(native_sdpa(query, key, value, attn_mask, is_causal, scale), query, key, reason)
        return passed_on
    query, key, value, attn_mask = autocast_as_sdpa(query, key, value, attn_mask)
    out: Tensor = _attend(query, key, value, attn_mask, is_causal, scale)
    return out


def _warn_stray() -> None:
    if not getattr(_local, "warned_stray", False):
        _local.warned_stray = True
        logger.warning("attention was called outside a denoiser's forward: no step and no grid, so it runs densely and is not counted")
