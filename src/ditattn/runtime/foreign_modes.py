"""Torch-function modes that others put between a model and its attention: guidance that perturbs attention works by them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ditattn.runtime.key_padding import broadcastable

__all__ = ["OwnMode", "native_sdpa", "why_native"]

# modes of torch that replace no attention: the device of new tensors, and tracers
_HARMLESS = ("torch._dynamo", "torch._higher_order_ops", "torch.fx", "torch.overrides")


class OwnMode(TorchFunctionMode):
    """Base of the modes of this package, which stand in nobody's way."""


def why_native() -> str | None:
    """Why the attention call that is made now must be torch's own: a mode of somebody else would see it. None if there is none.

    The innermost such mode is named. A mode that is running is not among the active ones, so that a call which it hands on is served.
    """
    for mode in reversed(_get_current_function_mode_stack()):
        if not isinstance(mode, (OwnMode, DeviceContext)) and not type(mode).__module__.startswith(_HARMLESS):
            return f"torch function mode {type(mode).__name__}"
    return None


def native_sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """Torch's SDPA as diffusers calls it, so that the active modes see it: `[B, S, H, D]` in and out."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask = None if attn_mask is None else broadcastable(attn_mask)
    grouped = key.shape[2] != query.shape[2]
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)
