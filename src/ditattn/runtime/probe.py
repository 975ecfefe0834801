"""What sparse settings would do to the attention calls of a dense run: error, dropped softmax mass, density and time of every call.

The run goes on with the dense outputs, so every setting sees the very same inputs, and nothing has to be kept in memory.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ditattn.backends.base import AttentionImpl, AttentionMetadata, CallRecord
from ditattn.plan.block_deal import BlockDeal
from ditattn.plan.block_plan import BlockPlan
from ditattn.plan.token_order import TokenOrder
from ditattn.runtime.forward import Forward
from ditattn.runtime.metadata import build_attn_metadata, for_forward
from ditattn.runtime.served_model import ServedModel
from ditattn.runtime.split import RankShare

__all__ = ["CellReading", "Probe", "SparseProbe", "dropped_mass"]

# query rows of each head whose softmax is computed in full to see what a plan drops
MASS_ROWS = 128

# keeps the relative error of an all-zero output finite
SMALLEST = 1e-30


@dataclass(frozen=True)
class CellReading:
    """One component, step and layer under one setting; means over its calls.

    Attributes:
        component, step, layer: where.
        error: squared error of the sparse output relative to the dense output's square; 0 where the setting runs densely.
        dropped_mass: share of the softmax mass in dropped blocks, 0..1, over evenly spaced query rows.
        density: kept share of query-key pairs.
        sparse_ms, dense_ms: time of the sparse and of the dense call, selection included.
    """

    component: str
    step: int
    layer: int
    error: float
    dropped_mass: float
    density: float
    sparse_ms: float
    dense_ms: float


class _Cell:
    """Values of the calls; those on the device stay there until somebody asks."""

    def __init__(self) -> None:
        self.values: tuple[list[Tensor], ...] = ([], [], [])
        self.sparse_ms: list[float] = []
        self.dense_ms: list[float] = []

    def add(self, sparse_ms: float, *values: Tensor) -> None:
        self.sparse_ms.append(sparse_ms)
        for column, value in zip(self.values, values, strict=True):
            column.append(value)

    def reading(self, component: str, step: int, layer: int) -> CellReading:
        error, mass, density = (float(torch.stack(column).mean()) for column in self.values)
        return CellReading(component, step, layer, error, mass, density, fmean(self.sparse_ms), fmean(self.dense_ms))


@dataclass(frozen=True)
class _Call:
    """A call of the dense run."""

    forward: Forward
    layer: int
    impl: AttentionImpl
    query: Tensor
    key: Tensor
    value: Tensor
    metadata: AttentionMetadata
    dense: Tensor
    dense_ms: float

    @property
    def share(self) -> RankShare:
        """What this rank has of the call. A padded one that ranks have gathered was put in the model's order before it came here."""
        share = self.forward.share
        return share if self.metadata.key_lengths is None else replace(share, gathered=None)


class Probe(Protocol):
    """Sees every self-attention call of a stage after it was served, and changes nothing."""

    def look(
        self,
        forward: Forward,
        layer: int | None,
        impl: AttentionImpl,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        metadata: AttentionMetadata,
        out: Tensor,
    ) -> None: ...


class SparseProbe:
    """Tries settings on every call of a run that a dense backend serves.

    Args:
        candidates: for each setting, by component, the backend and configuration that would serve it; a component that a setting leaves
            dense is absent.
    """

    def __init__(self, candidates: Sequence[Mapping[str, ServedModel]]) -> None:
        self._candidates = candidates
        self._cells: list[dict[tuple[str, int, int], _Cell]] = [{} for _ in candidates]
        self._impls: dict[tuple[Any, ...], AttentionImpl] = {}
        self._metadata: dict[tuple[int, str], tuple[Any, AttentionMetadata]] = {}
        self._record: CallRecord | None = None

    def readings(self, setting: int) -> list[CellReading]:
        """What was seen of one setting, in order of component, step and layer."""
        return [cell.reading(*place) for place, cell in sorted(self._cells[setting].items())]

    def look(
        self,
        forward: Forward,
        layer: int | None,
        impl: AttentionImpl,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        metadata: AttentionMetadata,
        out: Tensor,
    ) -> None:
        if layer is None or forward.step.index is None:
            return
        records = list(forward.records)
        # the run's own call may have been the first of its kind; this one is timed like the others
        dense, dense_ms = _timed(impl, query, key, value, metadata)
        for number, models in enumerate(self._candidates):
            model = models.get(forward.model.name)
            if model is not None:
                call = _Call(forward, layer, impl, query, key, value, metadata, dense, dense_ms)
                self._try(number, model, call)
        # what was tried is no part of what ran
        forward.records[:] = records

    def _try(self, number: int, model: ServedModel, call: _Call) -> None:
        assert call.forward.step.index is not None
        cell = self._cells[number].setdefault((model.name, call.forward.step.index, call.layer), _Cell())
        cell.dense_ms.append(call.dense_ms)
        metadata = self._metadata_of(number, model, call)
        impl = self._impl_of(number, model, call)
        self._record = None
        out, sparse_ms = _timed(impl, call.query, call.key, call.value, metadata)
        record = self._seen()
        if record is None or record.plan is None:
            cell.add(sparse_ms, *torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
            return
        dense = call.dense.double()
        error = (out.double() - dense).square().sum() / dense.square().sum().clamp_min(SMALLEST)
        order, query_order = record.order, record.query_order
        mass = dropped_mass(call.query, call.key, record.plan, order, call.impl.softmax_scale, metadata.key_lengths, query_order)
        cell.add(sparse_ms, error, mass, record.plan.density_tensor())

    def _metadata_of(self, number: int, model: ServedModel, call: _Call) -> AttentionMetadata:
        """Built once per step, as for a run of the setting."""
        key = (call.forward.step, call.forward.layout, call.share)
        cached = self._metadata.get((number, model.name))
        if cached is None or cached[0] != key:
            cached = self._metadata[number, model.name] = (key, build_attn_metadata(model.builder, model.config, *key))
        metadata, seen = for_forward(cached[1], call.forward.id), call.metadata
        return replace(metadata, key_lengths=seen.key_lengths, known_key_lengths=seen.known_key_lengths)

    def _impl_of(self, number: int, model: ServedModel, call: _Call) -> AttentionImpl:
        twin = call.impl
        key = (number, model.name, call.layer, twin.num_heads, twin.head_size, twin.num_kv_heads, twin.softmax_scale, twin.causal)
        if key not in self._impls:
            self._impls[key] = model.backend.get_impl_cls()(
                twin.num_heads,
                twin.head_size,
                twin.softmax_scale,
                twin.causal,
                twin.num_kv_heads,
                twin.prefix,
                layer_index=call.layer,
                observer=self._observe,
            )
            self._impls[key].inside_op = True
        return self._impls[key]

    def _observe(self, record: CallRecord) -> None:
        self._record = record

    def _seen(self) -> CallRecord | None:
        """What the last tried call recorded."""
        return self._record


def dropped_mass(
    query: Tensor,
    key: Tensor,
    plan: BlockPlan,
    order: TokenOrder | None,
    scale: float,
    key_lengths: Tensor | None = None,
    query_order: TokenOrder | BlockDeal | None = None,
) -> Tensor:
    """Share of the softmax mass that lies in blocks which `plan` drops: a float64 scalar on the device.

    A method that lets means stand in for what it drops loses less than this share.

    Args:
        query: `[B, S, H, D]` as the call had it.
        key: `[B, T, G, D]`, H a multiple of G, as the call had it.
        plan: in `order`.
        order: of the tokens; None is the model's own.
        scale: factor on the scores.
        key_lengths: integer `[B]`, real keys of each batch element in that order.
        query_order: of the queries, where it is not that of the keys.

    The mean over batch, heads and MASS_ROWS evenly spaced query rows, in fp32.
    """
    if order is not None:
        query, key = (query_order or order).apply(query), order.apply(key)
    rows = torch.linspace(0, query.shape[1] - 1, min(MASS_ROWS, query.shape[1]), device=query.device).round().long()
    query = query[:, rows]
    dropped = ~plan.to_mask()[:, :, rows // plan.block_size]
    sums = [
        _dropped_of_head(
            query[element, :, head],
            key[element, :, head * key.shape[2] // query.shape[2]],
            dropped[element % dropped.shape[0], head % dropped.shape[1]],
            plan.block_size,
            scale,
            None if key_lengths is None else key_lengths[element],
        )
        for element in range(query.shape[0])
        for head in range(query.shape[2])
    ]
    return torch.stack(sums).mean()


def _dropped_of_head(query: Tensor, key: Tensor, dropped: Tensor, block_size: int, scale: float, key_length: Tensor | None) -> Tensor:
    """query `[R, D]`, key `[T, D]`, dropped bool `[R, N]`."""
    scores = query.float() @ key.float().T * scale
    if key_length is not None:
        scores = scores.masked_fill(torch.arange(key.shape[0], device=key.device) >= key_length, -torch.inf)
    mass = scores.softmax(-1)
    padding = dropped.shape[1] * block_size - key.shape[0]
    by_block = nn.functional.pad(mass, (0, padding)).unflatten(-1, (-1, block_size)).sum(-1)
    return (by_block * dropped).double().sum() / len(query)


def _timed(impl: AttentionImpl, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata) -> tuple[Tensor, float]:
    _wait_for(query.device)
    start_s = time.perf_counter()
    out = impl.forward(query, key, value, metadata)
    _wait_for(query.device)
    return out, (time.perf_counter() - start_s) * 1e3


def _wait_for(device: torch.device) -> None:
    module = None if device.type == "cpu" else getattr(torch, device.type, None)
    if module is not None:
        module.synchronize(device)
