"""permuted_sparse_attn: an order of tokens for each head, blocks by the error that their mean would make, and the means of the others.

The three seed methods keep one order for all heads, rank blocks by their estimated mass, and leave dropped blocks out. What each change
brings is measured in docs/backends/permuted_sparse_attn.md, which also names the sources.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from pydantic import field_validator
from torch import Tensor

from ditattn.backends.base import CallRecord
from ditattn.backends.config import SparseAttentionConfig
from ditattn.backends.residuals import LEAST_SPARSE_STEPS, Refreshes, Residuals, refreshes, without_residual
from ditattn.backends.selection import tail_error
from ditattn.backends.selection.tail_error import Forced, QueryGroups, query_groups
from ditattn.backends.sparse import (
    Reason,
    SparseAttentionBackend,
    SparseAttentionImpl,
    SparseAttentionMetadata,
    SparseAttentionMetadataBuilder,
)
from ditattn.devices import find_device
from ditattn.errors import ConfigError
from ditattn.ops import block_sparse_attention as sparse_op
from ditattn.ops.contract import checked_scale
from ditattn.ops.pooled_tail import PooledTail
from ditattn.ops.tail_estimate import KeySummary, key_summary, tail_cost
from ditattn.plan.block_plan import BLOCK_SIZE, BlockPlan
from ditattn.plan.bricks import FLAT, Brick, brick_name, brick_names, brick_order, brick_shapes, parse_bricks
from ditattn.plan.reuse import MAX_UNNAMED
from ditattn.plan.split import HeadShare
from ditattn.plan.token_order import TokenOrder

__all__ = ["PermutedSparseAttentionBackend", "PermutedSparseAttentionConfig", "PermutedSparseAttentionImpl"]

logger = logging.getLogger("ditattn")

# query blocks on which the candidates are compared with the dense result: an eighth of all, within these bounds. Eight blocks are a quarter
# of the smallest videos, where more would take longer than the choice is worth; of the largest a few say as much as many.
SAMPLE_SHARE = 8
SAMPLE_BLOCKS = 8, 32
# of the device's memory, what the residual of one layer may take for residual="auto": 64 layers in two branches then fill half of it
RESIDUAL_SHARE = 1 / 256
# of the best blocks of every row, kept whatever other rows need
LEAST_BLOCKS = 2


class PermutedSparseAttentionConfig(SparseAttentionConfig):
    """Keys of `permuted_sparse_attn`.

    Attributes:
        token_order: always "bricks": 128 tokens that stand together in space and time, of a shape that each head chooses.
        first_frame_sink: every query keeps the blocks of a video's first frame; its own rows are chosen like others.
        bricks: the shapes to choose from, "frames x rows x columns" with a product of 128, such as "1x8x16,4x2x16"; "auto" takes what fits
            the grid.
        head_bricks: for each layer the shape of every key head, or one for all of them, separated by commas, as `tune` found them; layers
            without an entry choose from `bricks`.
        tail: a dropped block still counts through its mean key and mean value; False leaves it out.
        residual: some steps among the sparse ones run densely, and the sparse ones between them add what the sparse output of the last
            dense step lacked. `sparsity` holds for all of these steps together. The residual is kept between steps, a byte for each element
            of a layer's output and branch of guidance; "auto" does so where one takes at most 1/256 of the device's memory. Images, and
            runs in which fewer than 16 steps are free to be sparse, only add that of the last of the first dense steps; runs with fewer
            than eight, a sparsity below 1/3, and hosts that do not say which forwards belong together do without.
    """

    token_order: Literal["bricks"] = "bricks"  # type: ignore[assignment]
    bricks: str = "auto"
    head_bricks: tuple[str, ...] = ()
    tail: bool = True
    residual: bool | Literal["auto"] = "auto"

    def named_layers(self) -> Mapping[str, Collection[int]]:
        return {**super().named_layers(), "head_bricks": [layer for layer, names in enumerate(self.head_bricks) if names]}

    @property
    def outlasts_steps(self) -> bool:
        return self.residual is not False or super().outlasts_steps

    @field_validator("bricks")
    @classmethod
    def _check_bricks(cls, value: str) -> str:
        if value != "auto" and not parse_bricks(value):
            raise ValueError("name at least one shape, such as 4x2x16, or auto")
        return value

    @field_validator("head_bricks")
    @classmethod
    def _check_head_bricks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for names in value:
            parse_bricks(names)
        return value


class PermutedSparseAttentionMetadataBuilder(SparseAttentionMetadataBuilder):
    config_cls = PermutedSparseAttentionConfig


@dataclass(frozen=True, eq=False)
class _Orders:
    """Of one layer's tokens.

    Attributes:
        keys: and queries too, where a call has all of them.
        queries: of a rank's own ones, where it keeps some and has everybody's keys.
        forced: key blocks that every query keeps (text, and the first frame), query blocks that keep everything (text); for the queries of
            each grid.
        own_blocks: queries of a rank's own make other blocks than all queries do.
    """

    keys: TokenOrder
    queries: TokenOrder
    forced: tuple[Forced, ...]
    own_blocks: bool = False

    @classmethod
    def of(cls, order: TokenOrder, metadata: SparseAttentionMetadata, device: torch.device) -> _Orders:
        stored = metadata.as_stored(order, device)
        if metadata.rows is None:
            return cls(stored, stored, _forced(stored, stored, metadata, device))
        rows = metadata.rows.ordered(order, device)
        return cls(stored, rows.order, _forced(stored, rows.order, metadata, device), rows.own_blocks)

    @property
    def together(self) -> bool:
        return self.queries is self.keys


@dataclass(frozen=True)
class _Means:
    """Of one call in one order: what selection and tail are made from."""

    query: QueryGroups
    keys: KeySummary

    def cost(self, groups: Tensor, scale: float) -> Tensor:
        """Of some query groups `[B, H, R * 2, D]`: `[B, H, R, N]`."""
        return tail_cost(groups, self.keys, scale)

    @property
    def valid(self) -> Tensor:
        """bool `[B or 1, N]`: blocks with a real token."""
        return self.keys.tail.counts > 0


class PermutedSparseAttentionImpl(SparseAttentionImpl):
    """Not causal.

    Raises:
        UnsupportedCall: causal=True.
    """

    not_causal = "permuted_sparse_attn"
    keeps_first_frame_rows = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._residuals = Residuals()
        self._chosen: tuple[object, _Orders] | None = None
        self._not_reported: tuple[str, ...] | None = None

    def end_run(self) -> None:
        super().end_run()
        self._chosen = None
        self._residuals.forget()

    def why_dense(self, query: Tensor, key: Tensor, metadata: SparseAttentionMetadata) -> str | None:
        reason = super().why_dense(query, key, metadata)
        if reason is None and metadata.current_timestep in _refreshes(query, metadata).steps:
            return Reason.REFRESH
        return reason

    def learns(self, query: Tensor, key: Tensor, metadata: SparseAttentionMetadata, reason: str) -> bool:
        """The result is exact, the next step runs sparse, and enough sparse steps follow to make it worth its time."""
        if reason not in (Reason.FIRST_STEPS, Reason.REFRESH) or self._why_never(query, key, metadata) is not None:
            return False
        step, first, num_steps = metadata.current_timestep, metadata.skip_first_steps, metadata.num_steps
        if step in _refreshes(query, metadata).before_sparse:
            return True
        few = num_steps is not None and _num_free_steps(metadata) < LEAST_SPARSE_STEPS
        return first is not None and step == first - 1 and not few

    def learn(self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata, reason: str, out: Tensor) -> CallRecord:
        """The orders of the heads, by what each would make of this call, and the residual."""
        if not self.learns(query, key, metadata, reason):
            return CallRecord(reason)
        if self._known_order(query, key, metadata) is None:
            self._choose(query, key, value, metadata, out)
        step, num_steps, forward_id = metadata.current_timestep, metadata.num_steps, metadata.forward_id
        if step not in _refreshes(query, metadata).before_sparse:
            return CallRecord(reason)
        assert step is not None
        assert num_steps is not None
        assert forward_id is not None
        sparse, made = self._sparse_output(query, key, value, metadata)
        self._residuals.keep(out - sparse, step, num_steps, forward_id, _facts(query, key, metadata))
        return CallRecord(reason, beside=made.plan, token_orders=made.token_orders)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata) -> tuple[Tensor, CallRecord]:
        out, record = self._sparse_output(query, key, value, metadata)
        step, forward_id = metadata.current_timestep, metadata.forward_id
        if step is not None and forward_id is not None:
            out = self._residuals.added(out, step, forward_id, _facts(query, key, metadata))
        return out, record

    def _sparse_output(self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata) -> tuple[Tensor, CallRecord]:
        orders = self._known_order(query, key, metadata) or self._choose(query, key, value, metadata, None)
        means = self._means(query, key, value, metadata, orders)
        sparsity = _refreshes(query, metadata).sparsity
        record = self._plans.of_call(query, key, metadata, lambda: self._plan(means, sparsity, metadata, orders))
        assert record.plan is not None
        tail = means.keys.tail if metadata.tail else None
        out = self._attend_ordered(query, key, value, record.plan, metadata.key_lengths, orders, tail)
        chosen, self._not_reported = self._not_reported, None
        queries = None if orders.together else orders.queries
        return out, replace(record, order=orders.keys, query_order=queries, own_blocks=orders.own_blocks, token_orders=chosen)

    def _attend_ordered(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: BlockPlan,
        key_lengths: Tensor | None,
        orders: _Orders,
        tail: PooledTail | None,
    ) -> Tensor:
        if orders.together:
            return self._sparse(query, key, value, plan, key_lengths, orders.keys, tail)
        q, k, v = orders.queries.apply(query), orders.keys.apply(key), orders.keys.apply(value)
        as_they_stand = replace(orders.keys, forward=None, inverse=None)
        return orders.queries.undo(self._sparse(q, k, v, plan, key_lengths, as_they_stand, tail))

    def more_needs(self, metadata: SparseAttentionMetadata) -> frozenset[str]:
        return frozenset({"tail"}) if metadata.tail else frozenset()

    def _means(self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata, orders: _Orders) -> _Means:
        queries = query_groups(query, orders.queries)
        scale = checked_scale(self.softmax_scale, self.head_size)
        return _Means(queries, key_summary(queries.of_all(key.shape[2]), key, value, orders.keys, metadata.key_lengths, scale))

    def _plan(self, means: _Means, sparsity: float, metadata: SparseAttentionMetadata, orders: _Orders) -> BlockPlan:
        costs, valid = means.cost(means.query.means, checked_scale(self.softmax_scale, self.head_size)), means.valid
        # the rows of every grid share a budget of their own
        parts = zip(orders.queries.blocks_of_grids(), orders.forced, strict=True)
        picked = [tail_error.pick(costs[:, :, slice(*span)], sparsity, forced, valid, LEAST_BLOCKS) for span, forced in parts]
        mask = torch.cat(picked, dim=2)
        return BlockPlan.from_mask(mask, orders.queries.length, orders.keys.length)

    def _known_order(self, query: Tensor, key: Tensor, metadata: SparseAttentionMetadata) -> _Orders | None:
        """The orders that were chosen for these tokens in this run."""
        facts = _facts(query, key, metadata)
        return self._chosen[1] if self._chosen is not None and self._chosen[0] == facts else None

    def _choose(self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata, dense: Tensor | None) -> _Orders:
        """An order for each key head: the given one, or the one whose error on some query blocks is least."""
        bricks = self._given_bricks(key.shape[2], metadata) or self._best_bricks(query, key, value, metadata, dense)
        order = _per_head([_in_bricks(brick, metadata, query.device) for brick in bricks])
        orders = _Orders.of(order, metadata, query.device)
        self._chosen = (_facts(query, key, metadata), orders)
        self._not_reported = tuple(brick_names(brick, metadata.further_grids) for brick in bricks)
        return orders

    def _given_bricks(self, heads: int, metadata: SparseAttentionMetadata) -> list[Brick] | None:
        """Those of `head_bricks` for the key heads of this layer; None where it has none.

        Raises:
            ConfigError: for another number of heads, or for a grid that has other shapes to choose from.
        """
        given, layer, grid = metadata.head_bricks, self.layer_index, metadata.latent_shape
        assert grid is not None
        if layer is None or layer >= len(given) or not given[layer]:
            return None
        named = [parse_bricks(name)[0] for name in given[layer].split(",")]
        # the whole entry is checked, so that ranks that share the heads refuse it together: one alone would leave the others waiting
        share = self._head_share(heads, metadata)
        all_heads = heads if share is None else share.num_heads
        if len(named) not in (1, all_heads):
            raise ConfigError(
                f"head_bricks: layer {layer} has {all_heads} key heads, its entry names {len(named)}: give one for each, or one"
            )
        strange = [brick for brick in named if any(size > most for size, most in zip(brick[1:], grid[1:], strict=True)) and brick != FLAT]
        if strange or max(named)[0] > max(grid[0] - 1, 1):
            wrong = brick_name(strange[0] if strange else max(named))
            raise ConfigError(
                f"head_bricks: {wrong} does not fit the {' x '.join(map(str, grid))} tokens of this call; it was found at another size: "
                "tune at this one, or leave the key out"
            )
        return named * heads if len(named) == 1 else named[slice(None) if share is None else share.own]

    def _head_share(self, heads: int, metadata: SparseAttentionMetadata) -> HeadShare | None:
        """Which key heads of the layer these are; None where they are all, as in layers whose weights are whole."""
        if metadata.heads is None:
            return None
        num_heads = metadata.heads.num_heads * self.num_kv_heads // self.num_heads
        return None if heads == num_heads else replace(metadata.heads, num_heads=num_heads)

    def _best_bricks(
        self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata, dense: Tensor | None
    ) -> list[Brick]:
        """By the error on some query blocks: measured where the dense result is given, else estimated."""
        assert metadata.latent_shape is not None
        bricks = brick_shapes(metadata.latent_shape) if metadata.bricks == "auto" else parse_bricks(metadata.bricks)
        if len(bricks) == 1:
            return [bricks[0]] * key.shape[2]
        orders = (_Orders.of(_in_bricks(brick, metadata, query.device), metadata, query.device) for brick in bricks)
        errors = [self._error(query, key, value, metadata, order, dense) for order in orders]
        # heads of a group share an order, since they share keys
        best = torch.stack(errors).unflatten(1, (key.shape[2], -1)).sum(2).argmin(0)
        return [bricks[number] for number in best.tolist()]

    def _error(
        self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata, orders: _Orders, dense: Tensor | None
    ) -> Tensor:
        """Squared error of every query head in these orders on the sample blocks, `[H]`: measured against `dense`, or estimated."""
        means = self._means(query, key, value, metadata, orders)
        blocks = _sample(orders.queries, query.device)
        costs, valid = means.cost(means.query.at(blocks), checked_scale(self.softmax_scale, self.head_size)), means.valid
        # each row with a budget of its own: what a row would get of a common one depends on the orders of all heads
        by_row = costs.flatten(0, 2)[:, None, None]
        valid_by_row = valid.expand(costs.shape[0], -1).repeat_interleave(costs.shape[1] * costs.shape[2], dim=0)
        forced = orders.forced[0].in_one_row()
        mask = tail_error.pick(by_row, _refreshes(query, metadata).sparsity, forced, valid_by_row, LEAST_BLOCKS).view_as(costs)
        if dense is None:
            return costs.masked_fill(mask, 0).sum((0, 2, 3))
        places = (blocks.unsqueeze(1) * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=query.device)).flatten()
        assert orders.queries.forward is not None
        tokens = orders.queries.forward[places[places < orders.queries.length]]
        rows, exact = query[:, tokens], dense[:, tokens]
        plan = BlockPlan.from_mask(mask, len(tokens), key.shape[1])
        out = sparse_op.block_sparse_attention(
            rows,
            orders.keys.apply(key),
            orders.keys.apply(value),
            plan,
            scale=self.softmax_scale,
            key_lengths=metadata.key_lengths,
            tail=means.keys.tail if metadata.tail else None,
        )
        return (out.float() - exact.float()).square().sum((0, 1, 3))


def _refreshes(query: Tensor, metadata: SparseAttentionMetadata) -> Refreshes:
    """How the run spends its budget on calls like this one."""
    first, last, num_steps = metadata.skip_first_steps, metadata.skip_last_steps, metadata.num_steps
    if first is None or last is None or num_steps is None or not _has_residual(query, metadata):
        return without_residual(metadata.sparsity)
    is_video = metadata.latent_shape is not None and metadata.latent_shape[0] > 1
    return refreshes(metadata.sparsity, first, num_steps - last, is_video=is_video)


def _has_residual(query: Tensor, metadata: SparseAttentionMetadata) -> bool:
    forward_id = metadata.forward_id
    if not metadata.residual or forward_id is None or forward_id.number >= MAX_UNNAMED:
        return False
    return metadata.residual is True or _has_room(query.numel(), query.device.type)


@lru_cache
def _has_room(residual_bytes: int, device_type: str) -> bool:
    """True if residual="auto" keeps residuals of that size; says once where it does not."""
    memory = _memory_bytes(device_type)
    if memory is None or residual_bytes <= RESIDUAL_SHARE * memory:
        return True
    logger.warning(
        "permuted_sparse_attn: residual=auto does without residuals: one layer's would take %d MB, more than 1/%d of the %d MB of the %s; "
        "residual=true keeps them all the same",
        residual_bytes >> 20,
        round(1 / RESIDUAL_SHARE),
        memory >> 20,
        device_type,
    )
    return False


def _memory_bytes(device_type: str) -> int | None:
    return find_device(device_type).memory_bytes()


def _num_free_steps(metadata: SparseAttentionMetadata) -> int:
    """Steps of the run that neither `skip_first_steps` nor `skip_last_steps` makes dense."""
    assert metadata.num_steps is not None
    return metadata.num_steps - (metadata.skip_first_steps or 0) - (metadata.skip_last_steps or 0)


def _facts(query: Tensor, key: Tensor, metadata: SparseAttentionMetadata) -> object:
    """What the chosen orders are for."""
    other = (metadata.num_prefix_tokens, metadata.num_suffix_tokens, metadata.further_grids)
    split = (metadata.gathered, metadata.rows, metadata.heads)
    return (metadata.latent_shape, *other, *split, query.shape[2], key.shape[2], query.device)


def _forced(keys: TokenOrder, queries: TokenOrder, metadata: SparseAttentionMetadata, device: torch.device) -> tuple[Forced, ...]:
    # made on the host: a device that is asked how many there are makes the host wait in every call
    columns = keys.protected_blocks(BLOCK_SIZE, metadata.whole_first_frames, "cpu")
    rows = queries.protected_blocks(BLOCK_SIZE, False, "cpu")
    return tuple(Forced.of(columns, rows[start:stop], device) for start, stop in queries.blocks_of_grids())


def _sample(order: TokenOrder, device: torch.device) -> Tensor:
    """Evenly spaced whole query blocks of the grids: int64; the short block where there is no whole one."""
    whole = max(order.num_whole_blocks, 1)
    least, most = SAMPLE_BLOCKS
    return torch.linspace(0, whole - 1, min(max(whole // SAMPLE_SHARE, least), most, whole), device=device).round().long()


def _in_bricks(brick: Brick, metadata: SparseAttentionMetadata, device: torch.device) -> TokenOrder:
    assert metadata.latent_shape is not None
    return brick_order(brick, metadata.latent_shape, metadata.num_prefix_tokens, metadata.num_suffix_tokens, device, metadata.further_grids)


def _per_head(orders: Sequence[TokenOrder]) -> TokenOrder:
    """Each head's own order as one; all of them have the grids first, each first frame at its beginning."""
    first = orders[0]
    if all(order is first for order in orders):
        return first
    forward, inverse = ([getattr(order, name) for order in orders] for name in ("forward", "inverse"))
    return replace(first, forward=torch.stack(forward), inverse=torch.stack(inverse))


class PermutedSparseAttentionBackend(SparseAttentionBackend):
    name = "permuted_sparse_attn"
    impl_cls = PermutedSparseAttentionImpl
    builder_cls = PermutedSparseAttentionMetadataBuilder
    config_cls = PermutedSparseAttentionConfig
    ops = ("block_sparse_attention", "block_mean", "tail_estimate", "dense_attention")
