"""What the laboratory of fidelity compares: methods of the package, variants by their own keys, and two bounds that no product has.

Random blocks bound a choice from below. The oracle knows the true mass of every block, from full attention in fp32: no ranking by mass in
that order of tokens keeps more.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ditattn.backends import registry
from ditattn.backends.config import RainFusionAttentionConfig
from ditattn.backends.setting import Setting
from ditattn.backends.sparse import SparseAttentionBackend, SparseAttentionImpl, SparseAttentionMetadata, SparseAttentionMetadataBuilder
from ditattn.errors import ConfigError, UnsupportedCall
from ditattn.plan.block_plan import BLOCK_SIZE, BlockPlan
from ditattn.plan.token_order import TokenOrder

# of every method: equal dense steps, and no sequence too short
COMMON: Mapping[str, Any] = {"skip_first_steps": "20%", "min_tokens": 0}

BOUNDS = {
    "random_blocks": "benchmarks.fidelity_methods:RandomBlocksBackend",
    "oracle_blocks": "benchmarks.fidelity_methods:OracleBlocksBackend",
}


# query rows of each head and call whose softmax is computed in full
RECALL_ROWS = 64


@dataclass(frozen=True)
class Method:
    """A backend with its own keys. Its sparsity is what the computed share is adjusted by."""

    name: str
    backend: str
    keys: Mapping[str, Any] = field(default_factory=dict)

    def setting(self, sparsity: float) -> Setting:
        """What is asked of the pipeline."""
        return Setting.parse(self.backend, {**COMMON, **self.keys, "sparsity": sparsity})


MAIN = ("rain_fusion_attn", "block_sparse_attn", "permuted_sparse_attn")

METHODS: tuple[Method, ...] = (
    *(Method(name, name) for name in MAIN),
    Method("permuted_no_tail", "permuted_sparse_attn", {"tail": False}),
    Method("permuted_4x2x16", "permuted_sparse_attn", {"bricks": "4x2x16"}),
    Method("permuted_1x8x16", "permuted_sparse_attn", {"bricks": "1x8x16"}),
    Method("permuted_free_first_frame", "permuted_sparse_attn", {"first_frame_sink": False}),
    Method("permuted_2_dense_steps", "permuted_sparse_attn", {"skip_first_steps": 2}),
    Method("permuted_7_dense_steps", "permuted_sparse_attn", {"skip_first_steps": 7}),
    Method("oracle", "oracle_blocks"),
    Method("random", "random_blocks"),
)


def methods_named(names: Sequence[str]) -> list[Method]:
    """The methods of these names.

    Raises:
        ConfigError: no such method; names the nearest one and lists all.
    """
    table = {method.name: method for method in METHODS}
    for name in names:
        if name not in table:
            nearest = difflib.get_close_matches(name, table, n=1, cutoff=0)[0]
            raise ConfigError(f"no method '{name}'; did you mean '{nearest}'? There is {', '.join(table)}")
    return [table[name] for name in dict.fromkeys(names)]


@contextmanager
def bounds_registered() -> Iterator[None]:
    """Inside the block the bounds are backends like any other, as if a package had brought them."""
    try:
        with patch.dict(registry.BACKENDS, BOUNDS):
            _forget_backends()
            yield
    finally:
        _forget_backends()


def _forget_backends() -> None:
    registry._declared.cache_clear()
    registry._load.cache_clear()


class BoundConfig(RainFusionAttentionConfig):
    """In tile order. No block of the first frame is forced: that would take budget from the choice that is to be bounded."""

    first_frame_sink: bool = False


class BoundMetadataBuilder(SparseAttentionMetadataBuilder):
    config_cls = BoundConfig


class RandomBlocksImpl(SparseAttentionImpl):
    """Blocks by lot, the same ones in every run."""

    def plan(self, query: Tensor, key: Tensor, attn_metadata: SparseAttentionMetadata, order: TokenOrder, protected: Tensor) -> BlockPlan:
        blocks = len(protected)
        seed = 1000 * (attn_metadata.current_timestep or 0) + (self.layer_index or 0)
        lots = torch.rand(query.shape[0], query.shape[2], blocks, blocks, generator=torch.Generator().manual_seed(seed))
        return best_of_rows(lots.to(query.device), attn_metadata.sparsity, protected, order.length)


class OracleBlocksImpl(SparseAttentionImpl):
    """Blocks by their true mass."""

    def plan(self, query: Tensor, key: Tensor, attn_metadata: SparseAttentionMetadata, order: TokenOrder, protected: Tensor) -> BlockPlan:
        refuse_padding(attn_metadata.key_lengths)
        rows = torch.arange(order.length, device=query.device)
        masses = [row_masses(query, key, order, part, self.softmax_scale).mean(2) for part in rows.split(BLOCK_SIZE)]
        return best_of_rows(torch.stack(masses, 2), attn_metadata.sparsity, protected, order.length)


class RandomBlocksBackend(SparseAttentionBackend):
    name = "random_blocks"
    impl_cls = RandomBlocksImpl
    builder_cls = BoundMetadataBuilder
    config_cls = BoundConfig


class OracleBlocksBackend(SparseAttentionBackend):
    name = "oracle_blocks"
    impl_cls = OracleBlocksImpl
    builder_cls = BoundMetadataBuilder
    config_cls = BoundConfig


def best_of_rows(scores: Tensor, sparsity: float, protected: Tensor, length: int) -> BlockPlan:
    """Each row's best blocks of scores `[B, H, M, N]`; `protected` bool `[N]` comes first.

    A row keeps N * (1 - sparsity) of them, rounded down in some rows and up in others, so that all rows together keep what was asked.
    """
    num_rows, blocks = scores.shape[2:]
    edges = (torch.arange(num_rows + 1, dtype=torch.float64) * blocks * (1 - sparsity)).round()
    kept = edges.diff().clamp(min=1).to(scores.device)
    ranks = scores.masked_fill(protected, torch.inf).argsort(-1, descending=True).argsort(-1)
    return BlockPlan.from_mask(ranks < kept.unsqueeze(-1), length, length)


def row_masses(query: Tensor, key: Tensor, order: TokenOrder, rows: Tensor, scale: float) -> Tensor:
    """Softmax mass of each key block for some query tokens: fp32 `[B, H, R, N]`, rows summing to 1.

    Args:
        query, key: `[B, S, H, D]` and `[B, S, G, D]`, in the model's order.
        order: the order whose blocks are meant, for all heads or one for each.
        rows: int64 `[R]`, places in that order.
        scale: factor on the scores.
    """
    q, k = order.apply(query)[:, rows].float(), order.apply(key).float().repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    masses = (torch.einsum("brhd,bshd->bhrs", q, k) * scale).softmax(-1)
    return torch.nn.functional.pad(masses, (0, -k.shape[1] % BLOCK_SIZE)).unflatten(-1, (-1, BLOCK_SIZE)).sum(-1)


def recall(query: Tensor, key: Tensor, plan: BlockPlan, order: TokenOrder, scale: float) -> Tensor:
    """Share of the softmax mass in the blocks of `plan`: a scalar, the mean over heads and RECALL_ROWS evenly spaced query rows."""
    rows = torch.linspace(0, order.length - 1, min(RECALL_ROWS, order.length), device=query.device).round().long()
    kept = plan.to_mask()[:, :, rows // plan.block_size]
    return (row_masses(query, key, order, rows, scale) * kept).sum(-1).mean()


@contextmanager
def recalls() -> Iterator[list[Tensor]]:
    """The recall of every sparse call inside the block, on the queries and keys and in the order with which it really ran."""
    found: list[Tensor] = []
    attend = SparseAttentionImpl._sparse

    def watched(
        impl: SparseAttentionImpl,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: BlockPlan,
        key_lengths: Tensor | None,
        order: TokenOrder,
        *more: Any,
        **named: Any,
    ) -> Tensor:
        refuse_padding(key_lengths)
        found.append(recall(query, key, plan, order, impl.softmax_scale))
        return attend(impl, query, key, value, plan, key_lengths, order, *more, **named)

    with patch.object(SparseAttentionImpl, "_sparse", watched):
        yield found


def refuse_padding(key_lengths: Tensor | None) -> None:
    """Raise UnsupportedCall for a call whose keys are partly padding: the laboratory counts every key."""
    if key_lengths is not None:
        raise UnsupportedCall("the laboratory of fidelity runs models without key padding, such as Wan")
