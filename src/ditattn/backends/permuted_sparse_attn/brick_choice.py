"""Which shape of brick orders the tokens of each key head: the given one, or the one that errs least on some query blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ditattn.backends.permuted_sparse_attn.head_orders import HeadOrders
from ditattn.backends.permuted_sparse_attn.means import LEAST_BLOCKS, Means
from ditattn.backends.permuted_sparse_attn.refresh_steps import refreshes_of
from ditattn.backends.selection import tail_error
from ditattn.backends.selection.tail_error import query_groups
from ditattn.backends.sparse import SparseAttentionMetadata
from ditattn.errors import ConfigError
from ditattn.ops import block_sparse_attention as sparse_op
from ditattn.plan.block_plan import BLOCK_SIZE, BlockPlan
from ditattn.plan.bricks import FLAT, Brick, brick_name, brick_shapes, parse_bricks
from ditattn.plan.split import ExchangeRows, HeadShare
from ditattn.plan.token_order import TokenOrder

__all__ = ["best_bricks", "given_bricks"]

# query blocks on which the candidates are compared with the dense result: an eighth of all, within these bounds. Eight blocks are a quarter
# of the smallest videos, where more would take longer than the choice is worth; of the largest a few say as much as many.
SAMPLE_SHARE = 8
SAMPLE_BLOCKS = 8, 32


def given_bricks(metadata: SparseAttentionMetadata, layer: int | None, heads: int, share: HeadShare | None) -> list[Brick] | None:
    """Those of `head_bricks` for the key heads of a layer; None where it has none.

    Args:
        heads: key heads of the call.
        share: which ones of the layer's they are; None where they are all.

    Raises:
        ConfigError: for another number of heads, or for a grid that has other shapes to choose from.
    """
    given, grid = metadata.head_bricks, metadata.latent_shape
    assert grid is not None
    if layer is None or layer >= len(given) or not given[layer]:
        return None
    named = [parse_bricks(name)[0] for name in given[layer].split(",")]
    # the whole entry is checked, so that ranks that share the heads refuse it together: one alone would leave the others waiting
    all_heads = heads if share is None else share.num_heads
    if len(named) not in (1, all_heads):
        raise ConfigError(f"head_bricks: layer {layer} has {all_heads} key heads, its entry names {len(named)}: give one for each, or one")
    strange = [brick for brick in named if any(size > most for size, most in zip(brick[1:], grid[1:], strict=True)) and brick != FLAT]
    if strange or max(named)[0] > max(grid[0] - 1, 1):
        wrong = brick_name(strange[0] if strange else max(named))
        raise ConfigError(
            f"head_bricks: {wrong} does not fit the {' x '.join(map(str, grid))} tokens of this call; it was found at another size: "
            "tune at this one, or leave the key out"
        )
    return named * heads if len(named) == 1 else named[slice(None) if share is None else share.own]


def best_bricks(
    query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata, scale: float, dense: Tensor | None
) -> list[Brick]:
    """By the error on some query blocks: measured where the dense result is given, else estimated."""
    assert metadata.latent_shape is not None
    bricks = brick_shapes(metadata.latent_shape) if metadata.bricks == "auto" else parse_bricks(metadata.bricks)
    if len(bricks) == 1:
        return [bricks[0]] * key.shape[2]
    orders = (_orders_of_sample(brick, metadata, query) for brick in bricks)
    errors = torch.stack([sample_error(query, key, value, metadata, order, scale, dense) for order in orders])
    if metadata.rows is not None and metadata.rows.exchange is not None:
        errors = _of_all_ranks(errors, metadata.rows.exchange, metadata.rows.places)
    # heads of a group share an order, since they share keys
    best = errors.unflatten(1, (key.shape[2], -1)).sum(2).argmin(0)
    return [bricks[number] for number in best.tolist()]


def _orders_of_sample(brick: Brick, metadata: SparseAttentionMetadata, query: Tensor) -> HeadOrders:
    heads, device, rows = query.shape[2], query.device, metadata.rows
    if rows is None or rows.exchange is None:
        return HeadOrders.in_bricks([brick], metadata, heads, device)
    return HeadOrders.of_dealt_sample(brick, metadata, heads, lambda order: _sample(order, torch.device("cpu")), device)


def _of_all_ranks(errors: Tensor, exchange: ExchangeRows, places: int) -> Tensor:
    """The sum of every rank's `[N, H]`: the same on all of them, so that all choose alike."""
    once = [1] * places
    every = exchange(errors.expand(1, places, -1, -1), once, once)[0]
    return torch.stack(every.unbind()).sum(0)


def sample_error(
    query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata, orders: HeadOrders, scale: float, dense: Tensor | None
) -> Tensor:
    """Squared error of every query head in these orders on the sample blocks, `[H]`: measured against `dense`, or estimated.

    Where the ranks of a ring deal out blocks, on this rank's share of the sample.
    """
    # asked of the call's own queries, by all ranks
    sparsity = refreshes_of(query, metadata).sparsity
    means = Means.of(query, key, value, metadata, orders, scale)
    if orders.deal is None:
        blocks = _sample(orders.queries, query.device)
        tokens = _tokens_of(blocks, orders.queries)
        groups, query, dense = means.query.at(blocks), query[:, tokens], None if dense is None else dense[:, tokens]
    else:
        query, dense = orders.deal.apply(query), None if dense is None else orders.deal.apply(dense)
        if not query.shape[1]:
            # there are more ranks than blocks in the sample
            return torch.zeros(query.shape[2], device=query.device)
        groups = query_groups(query, orders.deal.order).means
    costs, valid = means.cost(groups), means.valid
    # each row with a budget of its own: what a row would get of a common one depends on the orders of all heads
    by_row = costs.flatten(0, 2)[:, None, None]
    valid_by_row = valid.expand(costs.shape[0], -1).repeat_interleave(costs.shape[1] * costs.shape[2], dim=0)
    forced = orders.forced[0].in_one_row()
    mask = tail_error.pick(by_row, sparsity, forced, valid_by_row, LEAST_BLOCKS).view_as(costs)
    if dense is None:
        return costs.masked_fill(mask, 0).sum((0, 2, 3))
    out = sparse_op.block_sparse_attention(
        query,
        orders.keys.apply(key),
        orders.keys.apply(value),
        BlockPlan.from_mask(mask, query.shape[1], key.shape[1]),
        scale=scale,
        key_lengths=metadata.key_lengths,
        tail=means.keys.tail if metadata.tail else None,
    )
    return (out.float() - dense.float()).square().sum((0, 1, 3))


def _sample(order: TokenOrder, device: torch.device) -> Tensor:
    """Evenly spaced whole query blocks of the grids: int64; the short block where there is no whole one."""
    whole = max(order.num_whole_blocks, 1)
    least, most = SAMPLE_BLOCKS
    return torch.linspace(0, whole - 1, min(max(whole // SAMPLE_SHARE, least), most, whole), device=device).round().long()


def _tokens_of(blocks: Tensor, order: TokenOrder) -> Tensor:
    """Their places in the model's order."""
    places = (blocks.unsqueeze(1) * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=blocks.device)).flatten()
    assert order.forward is not None
    return order.forward[places[places < order.length]]
