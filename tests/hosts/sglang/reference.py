"""What our own layers make of query, key and value, without sglang."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import ditattn
from ditattn.backends.base import CallRecord
from ditattn.backends.registry import load_backend


def sparse(
    backend_name: str,
    config: dict[str, Any],
    qkv: list[Tensor],
    latents: tuple[int, ...],
    step: int,
    steps: int,
    num_suffix_tokens: int = 0,
) -> tuple[Tensor, float]:
    """The result and the density of the plan; by the reference implementation, where the method adds no means of what it drops."""
    heads, head_size = qkv[0].shape[2:]
    backend = load_backend(backend_name)
    records: list[CallRecord] = []
    impl = backend.get_impl_cls()(heads, head_size, layer_index=0, observer=records.append)
    metadata = backend.get_builder_cls()().build(
        current_timestep=step,
        raw_latent_shape=latents,
        patch_size=(1, 2, 2),
        config=backend.get_config_cls().from_mapping(config),
        num_steps=steps,
        num_suffix_tokens=num_suffix_tokens,
    )
    out = impl.forward(*qkv, metadata)
    [record] = records
    assert record.plan is not None
    if backend_name != "permuted_sparse_attn":
        out = ditattn.block_sparse_attention(*qkv, record.plan, order=record.order, implementation="reference")
    return out, record.plan.density()
