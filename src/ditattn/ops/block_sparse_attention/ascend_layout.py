"""From the models' `[B, S, H, D]` to the operators' layouts and back, together with the order of the tokens: one gather per tensor.

`[B, S, H, D]` and `[B, H, S, D]` are the same rows of D numbers in different places, and so is a reordered tensor. Where both change, one
list of row numbers does both, and the operator that gathers reads and writes contiguous memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from ditattn.ops.ascend import to_heads_first

__all__ = ["BNSD", "TND", "arranged", "restored"]

TND, BNSD = "TND", "BNSD"

# order or inverse -> {(batch, heads, from heads first): row numbers}; goes when the order goes
_rows_of = WeakIdKeyDictionary()


def arranged(x: Tensor, layout: str, head_dim: int, order: Tensor | None) -> Tensor:
    """`[B, S, H, D]` -> contiguous `[B * S, H, head_dim]` (TND) or `[B, H, S, head_dim]` (BNSD), zero-padded.

    Args:
        x: any strides.
        order: int64 `[S]`, position i of the result holds token `order[i]`; None leaves the tokens where they are.

    Without an order: no copy or one. With one: one copy, and one more where the head size is padded.
    """
    if order is None:
        return _packed(x, head_dim) if layout == TND else to_heads_first(x, head_dim)
    gathered = _gathered(x, layout == BNSD, order)
    return pad(gathered, (0, head_dim - x.shape[3])) if head_dim > x.shape[3] else gathered


def restored(out: Tensor, layout: str, like: Tensor, inverse: Tensor | None) -> Tensor:
    """What an operator gave, in `layout` -> `[B, S, H, D]` as `like`, token i from position `inverse[i]`.

    A view, or with an inverse one copy.
    """
    batch, length, heads, dim = like.shape
    if inverse is None:
        out = out.view(batch, length, heads, -1) if layout == TND else out.transpose(1, 2)
        return out[..., :dim]
    if layout == TND:
        return out.view(batch, length, heads, -1)[..., :dim].index_select(1, inverse)
    rows = _rows(inverse, batch, heads, from_heads_first=True)
    return out.reshape(-1, out.shape[3])[:, :dim].index_select(0, rows).view(like.shape)


def _packed(x: Tensor, head_dim: int) -> Tensor:
    """`[B, S, H, D]` -> contiguous `[B * S, H, head_dim]`; a view where nothing is missing."""
    return (x if x.shape[3] == head_dim else pad(x, (0, head_dim - x.shape[3]))).contiguous().flatten(0, 1)


def _gathered(x: Tensor, heads_first: bool, order: Tensor) -> Tensor:
    batch, length, heads, dim = x.shape
    shape = (batch, heads, length, dim) if heads_first else (batch * length, heads, dim)
    stored = x if heads_first else x.transpose(1, 2)
    if stored.is_contiguous():
        # it lies in memory as the operator does not want it: order and layout change together
        return stored.view(-1, dim).index_select(0, _rows(order, batch, heads, from_heads_first=not heads_first)).view(shape)
    # it lies there as the operator wants it, or with gaps, which the gather reads over
    return (x.transpose(1, 2).index_select(2, order) if heads_first else x.index_select(1, order)).view(shape)


def _rows(order: Tensor, batch: int, heads: int, *, from_heads_first: bool) -> Tensor:
    """int64 `[B * S * H]`: rows of a tensor in one layout, listed as the other layout has them with the tokens in `order`. Cached."""
    found: dict[tuple[int, int, bool], Tensor] = _rows_of.setdefault(order, {})
    key = (batch, heads, from_heads_first)
    if key not in found:
        found[key] = _row_numbers(order, batch, heads, from_heads_first)
    return found[key]


def _row_numbers(order: Tensor, batch: int, heads: int, from_heads_first: bool) -> Tensor:
    length = order.shape[0]
    element, head = (torch.arange(n, device=order.device) for n in (batch, heads))
    if from_heads_first:
        return ((element.view(-1, 1, 1) * heads + head) * length + order.view(1, -1, 1)).flatten()
    return ((element.view(-1, 1, 1) * length + order) * heads + head.view(1, -1, 1)).flatten()
