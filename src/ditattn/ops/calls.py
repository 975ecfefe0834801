"""One attention call as a value: what every implementation of an op takes.

Letters: B batch, S query tokens, T key tokens, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn.functional import pad

from ditattn.ops.contract import call_facts, check_qkv
from ditattn.ops.pooled_tail import PooledTail
from ditattn.ops.table import CallFacts, Implementation
from ditattn.plan.block_plan import BLOCK_SIZE, BlockPlan
from ditattn.plan.token_order import reordered

__all__ = ["Chosen", "DenseCall", "SparseCall"]

# calls of many sizes must not pile up
MAX_KINDS = 64


@dataclass(frozen=True, eq=False)
class DenseCall:
    """Attention over every key. The tensors fit together and the scale is finite: the op has checked that.

    Attributes:
        query: `[B, S, H, D]`, any strides.
        key, value: `[B, T, G, D]`, H a multiple of G.
        scale: factor on the scores.
        causal: query i sees keys 0..i.
        key_lengths: int32 or int64 `[B]`, how many leading keys of each batch element are real; None means all.
        attn_mask: bool (True is kept) or additive, broadcastable to `[B, H, S, T]`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    causal: bool = False
    key_lengths: Tensor | None = None
    attn_mask: Tensor | None = None

    def kind(self) -> tuple[Hashable, ...]:
        """Calls of one kind fit together or do not, and have the same facts."""
        return (*_tensor_kind(self.query, self.key, self.value, self.key_lengths), self.causal, self.attn_mask is None)

    def facts(self) -> CallFacts:
        """What the choice of an implementation depends on."""
        needs = {"causal": self.causal, "key_lengths": self.key_lengths is not None, "attn_mask": self.attn_mask is not None}
        return call_facts(self.query, self.key, **needs)

    def widened(self, head_dim: int) -> DenseCall:
        """The same call with zeros in every head up to a larger size, which changes no score and no column of the result up to D."""
        query, key, value = (_widened(x, head_dim) for x in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value)


@dataclass(frozen=True, eq=False)
class SparseCall:
    """Attention over the kept key blocks of `plan`. Tensors, plan and order fit together: the op has checked that.

    Attributes:
        query, key, value, scale, causal, key_lengths: as in DenseCall.
        plan: kept key blocks per batch element and query head.
        return_lse: the log-sum-exp is asked for.
        order, inverse: int64 `[S]`, or `[G, S]` with an order for each key head and its group; both or neither. Token i of the plan and of
            `key_lengths` is token `order[i]` of the tensors and of the result; S = T, and the call is not causal.
        tail: means that stand in for the dropped blocks, in the plan's order; the call is not causal, and the log-sum-exp includes them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    plan: BlockPlan
    scale: float
    causal: bool = False
    key_lengths: Tensor | None = None
    return_lse: bool = False
    order: Tensor | None = None
    inverse: Tensor | None = None
    tail: PooledTail | None = None

    def kind(self) -> tuple[Hashable, ...]:
        """As `DenseCall.kind`."""
        options = (self.causal, self.return_lse, self.plan.block_size, self.tail is None)
        return (*_tensor_kind(self.query, self.key, self.value, self.key_lengths), *options)

    def facts(self) -> CallFacts:
        """What the choice of an implementation depends on."""
        needs = {
            "causal": self.causal,
            "key_lengths": self.key_lengths is not None,
            "lse": self.return_lse,
            "tail": self.tail is not None,
        }
        return call_facts(self.query, self.key, **needs, other_block_size=self.plan.block_size != BLOCK_SIZE)

    def widened(self, head_dim: int) -> SparseCall:
        """As `DenseCall.widened`."""
        query, key, value = (_widened(x, head_dim) for x in (self.query, self.key, self.value))
        tail = self.tail
        if tail is not None:
            tail = PooledTail(_widened(tail.key, head_dim), _widened(tail.value, head_dim), tail.counts)
        return replace(self, query=query, key=key, value=value, tail=tail)

    def ordered(self) -> SparseCall:
        """The same call on copies of the tensors, whose tokens stand as the plan has them."""
        assert self.order is not None
        query, key, value = (reordered(x, self.order) for x in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value, order=None, inverse=None)


def _widened(x: Tensor, head_dim: int) -> Tensor:
    return x if x.shape[-1] == head_dim else pad(x, (0, head_dim - x.shape[-1]))


def _tensor_kind(query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None) -> tuple[Hashable, ...]:
    lengths = None if key_lengths is None else (key_lengths.shape, key_lengths.dtype, key_lengths.device)
    shapes = (query.shape, key.shape, value.shape)
    return (*shapes, query.dtype, key.dtype, value.dtype, query.device, key.device, value.device, lengths)


class Chosen:
    """The rows of one op's table that serve one layer: checked and chosen when a call of a kind is first met, then kept.

    Args:
        table: the op's.
        choose: `table.choose` or `table.choose_to_run`.
    """

    def __init__(self, table: tuple[Implementation, ...], choose: Callable[..., Implementation]) -> None:
        self._table, self._choose = table, choose
        self._rows: dict[Hashable, Implementation] = {}

    def row(self, call: DenseCall | SparseCall, names: tuple[str, ...] = ()) -> Implementation:
        """The row that serves the call: the first possible one of those named, or of all.

        Raises:
            UnsupportedCall, BackendUnavailable: see the op.
        """
        kind = (names, call.kind())
        row = self._rows.get(kind)
        if row is None:
            check_qkv(call.query, call.key, call.value, call.key_lengths)
            if len(self._rows) == MAX_KINDS:
                self._rows.clear()
            row = self._rows[kind] = self._choose(self._table, call.facts(), names)
        return row
