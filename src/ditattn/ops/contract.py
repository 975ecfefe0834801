"""What every attention op asks of its tensors, checked once at the border.

Layout everywhere: query `[B, S, H, D]`, key and value `[B, T, G, D]` with H a multiple of G (grouped heads), strided is fine.
"""

from __future__ import annotations

import ctypes
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor

from ditattn.arguments import described
from ditattn.errors import UnsupportedCall
from ditattn.ops.table import CallFacts

__all__ = [
    "call_facts",
    "check_like",
    "check_mask",
    "check_qkv",
    "checked_scale",
    "default_scale",
    "is_autocast_on",
    "joined",
    "refuse_gradients",
    "split",
    "without_autocast",
]

_AUTOCAST_DEVICES = ("cpu", "cuda", "npu", "xpu")
_LENGTH_DTYPES = (torch.int32, torch.int64)


def joined(names: tuple[str, ...]) -> str:
    """Names as the schema of a torch op can hold them, which knows no lists of strings."""
    return ",".join(names)


def split(text: str) -> tuple[str, ...]:
    """The names that `joined` was given."""
    return tuple(text.split(",")) if text else ()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside the block torch multiplies tensors of `device` in their own dtype, although the caller may run under `torch.autocast`."""
    return torch.autocast(device.type, enabled=False) if is_autocast_on(device.type) else _NOTHING


_NOTHING = nullcontext()


def is_autocast_on(device_type: str) -> bool:
    """Whether the caller runs under `torch.autocast` for that type of device; False for devices that have none."""
    # torch 2.9 cannot trace the question whether a type of device has it: not asked of the usual ones
    known = device_type in _AUTOCAST_DEVICES or torch.amp.is_autocast_available(device_type)
    return known and torch.is_autocast_enabled(device_type)


def refuse_gradients(context: object, *gradients: object) -> NoReturn:
    """The backward of every operation: there is none.

    Raises:
        UnsupportedCall: always.
    """
    raise UnsupportedCall(
        "ditattn computes attention and quantised layers forward only, and gradients were asked for: run inference under torch.no_grad(), "
        "and train with the model as it was, after remove()"
    )


def default_scale(head_dim: int) -> float:
    """1 / sqrt(D)."""
    return 1.0 / math.sqrt(head_dim)


def checked_scale(scale: float | None, head_dim: int) -> float:
    """The factor on the scores: 1 / sqrt(D) for None. A scale that fp32, in which it is applied, rounds to zero is zero.

    Raises:
        UnsupportedCall: the scale is no number, or NaN or infinite, as it stands or in fp32.
    """
    if scale is None:
        return default_scale(head_dim)
    if isinstance(scale, (str, bool, complex)) or not hasattr(scale, "__float__"):
        raise UnsupportedCall(f"scale must be a number or None, not {described(scale)}")
    scale = _number(scale)
    # a kernel that treats zero apart would otherwise meet a zero that Python did not see
    if not math.isfinite(scale) or not math.isfinite(applied := ctypes.c_float(scale).value):
        raise UnsupportedCall(f"the scale must be finite in fp32, not {scale}")
    return scale if applied else 0.0


def _number(scale: Any) -> float:
    try:
        return float(scale)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UnsupportedCall(f"scale must be one number or None, not {described(scale)} ({error})") from None


def check_qkv(query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None = None) -> None:
    """Raise UnsupportedCall unless the three tensors fit together.

    Args:
        key_lengths: int32 or int64 `[B]` on the device of the tensors, how many leading key tokens of each batch element are real.
    """
    if not (query.ndim == key.ndim == value.ndim == 4):
        raise UnsupportedCall(f"query, key, value must be [B, S, H, D], not {list(query.shape)}, {list(key.shape)}, {list(value.shape)}")
    if key.shape != value.shape:
        raise UnsupportedCall(f"key {list(key.shape)} and value {list(value.shape)} must have the same shape")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise UnsupportedCall(f"query {list(query.shape)} and key {list(key.shape)} must agree in batch and head size")
    if 0 in query.shape or 0 in key.shape:
        raise UnsupportedCall(f"no axis may be empty: query {list(query.shape)}, key {list(key.shape)}")
    if query.shape[2] % key.shape[2]:
        raise UnsupportedCall(f"{query.shape[2]} query heads are not a multiple of {key.shape[2]} key heads")
    if not (query.dtype == key.dtype == value.dtype):
        raise UnsupportedCall(f"query, key, value must share a dtype, not {query.dtype}, {key.dtype}, {value.dtype}")
    if not (query.device == key.device == value.device):
        raise UnsupportedCall(f"query, key, value must share a device, not {query.device}, {key.device}, {value.device}")
    if not query.dtype.is_floating_point:
        raise UnsupportedCall(f"attention needs a floating dtype, not {query.dtype}")
    if key_lengths is not None:
        _check_key_lengths(key_lengths, query)


def check_like(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise UnsupportedCall unless `x`, which an operation made in fp32, has this shape and device."""
    if x.shape != shape or x.dtype != torch.float32 or x.device != device:
        raise UnsupportedCall(f"{name} must be float32 {list(shape)} on {device}, not {x.dtype} {list(x.shape)} on {x.device}")


def _check_key_lengths(key_lengths: Tensor, query: Tensor) -> None:
    # narrower integers cannot be compared with every number of keys, and a kernel reads an address of another device as one of its own
    if key_lengths.shape != query.shape[:1] or key_lengths.dtype not in _LENGTH_DTYPES or key_lengths.device != query.device:
        found = f"{key_lengths.dtype} {list(key_lengths.shape)} on {key_lengths.device}"
        raise UnsupportedCall(f"key_lengths must be int32 or int64 [{query.shape[0]}] on {query.device}, not {found}")


def check_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> None:
    """Raise UnsupportedCall unless a dense call can take the mask: bool or additive, broadcastable to `[B, H, S, T]`."""
    scores = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    fits = attn_mask.ndim <= 4 and all(size in (1, full) for size, full in zip(reversed(attn_mask.shape), reversed(scores), strict=False))
    if not fits:
        raise UnsupportedCall(f"attn_mask must be broadcastable to [B, H, S, T] = {list(scores)}, not {list(attn_mask.shape)}")
    if attn_mask.dtype != torch.bool and not attn_mask.dtype.is_floating_point:
        raise UnsupportedCall(f"attn_mask must be bool (True is kept) or floating (added to the scores), not {attn_mask.dtype}")
    if attn_mask.device != query.device:
        raise UnsupportedCall(f"attn_mask must be on {query.device} as the query is, not on {attn_mask.device}")


def call_facts(query: Tensor, key: Tensor, **needs: bool) -> CallFacts:
    """Facts of a call; keyword flags that are true become needs."""
    wanted = {name for name, flag in needs.items() if flag}
    if query.shape[2] != key.shape[2]:
        wanted.add("gqa")
    if query.shape[1] != key.shape[1]:
        wanted.add("unequal_lengths")
    group = query.shape[2] // key.shape[2]
    return CallFacts(query.device.type, query.dtype, query.shape[3], frozenset(wanted), group, key.shape[1])
