"""Under `torch.autocast` a model counts on what torch's SDPA does to its tensors; the ops themselves ignore autocast (decision 0015)."""

from __future__ import annotations

import torch
from torch import Tensor

from ditattn.ops.contract import is_autocast_on

__all__ = ["autocast_as_sdpa"]


def autocast_as_sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors of an attention call in the dtype that torch's SDPA would give them: as they are where autocast is off."""
    device_type = query.device.type
    if not is_autocast_on(device_type):
        return query, key, value, attn_mask
    dtype = torch.get_autocast_dtype(device_type)
    return _cast(query, dtype), _cast(key, dtype), _cast(value, dtype), None if attn_mask is None else _cast(attn_mask, dtype)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # autocast leaves float64 alone, and masks that are no numbers
    return x.to(dtype) if x.dtype.is_floating_point and x.dtype != torch.float64 else x
