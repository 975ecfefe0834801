"""Rows that ranks of a ring deal out: whole ones of the first frame go to who has less to do before a call, others within it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditattn.backends.sparse import SparseAttentionImpl, SparseAttentionMetadata
from ditattn.ops.calls import DenseCall
from ditattn.plan.deal import Deal
from ditattn.runtime.metadata import with_dealt_rows
from ditattn.runtime.report import ComponentLog
from ditattn.runtime.split import RankShare, SequenceSplit, TensorSplit

if TYPE_CHECKING:
    from ditattn.runtime.forward import Forward

__all__ = ["attend_dealt", "dealt_metadata", "is_dealt", "with_exchange"]


def dealt_metadata(forward: Forward, arguments: Mapping[str, Any]) -> SparseAttentionMetadata | None:
    """The metadata of a forward's calls before which rows are dealt out; None where they are not. `arguments` are the forward's own."""
    if forward.share.rows is None or not isinstance(forward.split, SequenceSplit) or forward.split.exchange_rows is None:
        return None
    impl_cls = forward.model.backend.get_impl_cls()
    keeps = issubclass(impl_cls, SparseAttentionImpl) and impl_cls.keeps_first_frame_rows
    # some models take their tokens in lists
    values = chain.from_iterable(value if isinstance(value, list) else [value] for value in arguments.values())
    device_type = next(value.device.type for value in values if isinstance(value, Tensor))
    return with_dealt_rows(forward.metadata, keeps, device_type)


def with_exchange(share: RankShare, split: SequenceSplit | TensorSplit | None, log: ComponentLog) -> RankShare:
    """The share of a rank of a ring with what methods that deal out rows themselves exchange by: its time is no part of attention's."""
    if share.rows is None or not isinstance(split, SequenceSplit) or split.exchange_rows is None:
        return share
    exchange_rows = split.exchange_rows

    def exchange(x: Tensor, to_each: list[int], from_each: list[int]) -> Tensor:
        with log.communication.measure(x.device), log.stopwatch.leave_out(x.device):
            return exchange_rows(x, to_each, from_each)

    return replace(share, rows=replace(share.rows, exchange=exchange))


def is_dealt(forward: Forward, query: Tensor, key: Tensor) -> bool:
    """True for a call of a rank's own queries and everybody's keys, where ranks deal out rows."""
    rows = forward.share.rows
    return (
        forward.dealt is not None and rows is not None and (query.shape[1], key.shape[1]) == (rows.num_tokens, sum(rows.gathered.streams))
    )


def attend_dealt(forward: Forward, call: DenseCall, serve: Callable[[DenseCall], Tensor]) -> Tensor:
    """`serve` for the queries that a rank has after the deal, `[B, S / ranks, H, D]` in and out; every rank of the ring must come here."""
    assert forward.dealt is not None
    assert isinstance(forward.split, SequenceSplit)
    rows, exchange = forward.dealt.rows, forward.split.exchange_rows
    assert rows is not None
    assert exchange is not None
    assert isinstance(rows.dealt, Deal)
    query, deal, place = call.query, rows.dealt, rows.place
    stay, sent = (index.to(query.device) for index in (deal.stay[place], torch.cat(deal.sends[place])))
    to_each, from_each = deal.sizes(place)
    watch = forward.model.log.communication
    with watch.measure(query.device):
        came = exchange(query.index_select(1, sent), to_each, from_each)
    with forward.dealing():
        out = serve(replace(call, query=torch.cat([query.index_select(1, stay), came], 1)))
    with watch.measure(query.device):
        returned = exchange(out[:, len(stay) :], from_each, to_each)
    own = torch.empty_like(query)
    return own.index_copy_(1, stay, out[:, : len(stay)]).index_copy_(1, sent, returned)
