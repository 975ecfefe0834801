"""Calls of the sparse backends as their tests need them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditattn.backends.base import AttentionBackend, CallRecord
from ditattn.backends.block_sparse_attn import BlockSparseAttentionBackend
from ditattn.backends.rain_fusion_attn import RainFusionAttentionBackend
from ditattn.ops.pooled_tail import PooledTail
from ditattn.ops.tail_estimate import key_summary
from ditattn.plan.token_order import TokenOrder

SPARSE_BACKENDS: list[type[AttentionBackend]] = [BlockSparseAttentionBackend, RainFusionAttentionBackend]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tail_of(query: Tensor, key: Tensor, value: Tensor, order: TokenOrder) -> PooledTail:
    """The tail of a call of permuted_sparse_attn."""
    mean_query = query.float().mean(1).unflatten(1, (key.shape[2], -1)).mean(2)
    return key_summary(mean_query, key, value, order, None, query.shape[-1] ** -0.5).tail


def call(
    backend: type[AttentionBackend],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int, int],
    *,
    causal: bool = False,
    scale: float | None = None,
    layer_index: int | None = None,
    **metadata: Any,
) -> tuple[Tensor, CallRecord]:
    """One forward with the metadata that the backend's own builder makes; steps count as past the dense ones unless said."""
    fields: dict[str, Any] = {
        "current_timestep": 20,
        "num_steps": 50,
        "sparsity": 0.5,
        "raw_latent_shape": (1, 4, *grid),
        "patch_size": 1,
        **metadata,
    }
    built = backend.get_builder_cls()().build(**fields)
    records: list[CallRecord] = []
    impl = backend.get_impl_cls()(
        query.shape[2], query.shape[3], scale, causal, key.shape[2], "blocks.0.attn1", layer_index=layer_index, observer=records.append
    )
    out = impl.forward(query, key, value, built)
    assert len(records) == 1
    return out, records[0]
