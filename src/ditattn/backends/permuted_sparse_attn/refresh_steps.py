"""How a run spends its budget: which steps among the sparse ones run densely, and whether residuals are kept at all."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from ditattn.backends.residuals import Refreshes, refreshes, without_residual
from ditattn.backends.sparse import SparseAttentionMetadata
from ditattn.devices import find_device
from ditattn.plan.reuse import MAX_UNNAMED
from ditattn.plan.split import GatheredRows

__all__ = ["num_free_steps", "refreshes_of"]

logger = logging.getLogger("ditattn")

# of the device's memory, what the residual of one layer may take for residual="auto": 64 layers in two branches then fill half of it
RESIDUAL_SHARE = 1 / 256


def refreshes_of(query: Tensor, metadata: SparseAttentionMetadata) -> Refreshes:
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
    if metadata.residual is True:
        return True
    if metadata.rows is None or metadata.rows.exchange is None:
        return _has_room(query.numel(), query.device.type)
    return _all_have_room(query.numel(), query.device, metadata.rows)


@lru_cache
def _all_have_room(residual_bytes: int, device: torch.device, rows: GatheredRows) -> bool:
    """True if every rank of a ring has it: one that ran other steps densely than the others would leave them waiting for its queries."""
    assert rows.exchange is not None
    own = torch.tensor(float(_has_room(residual_bytes, device.type)), device=device)
    return bool(rows.exchange(own.expand(1, rows.places, 1, 1), [1] * rows.places, [1] * rows.places).all())


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


def num_free_steps(metadata: SparseAttentionMetadata) -> int:
    """Steps of the run that neither `skip_first_steps` nor `skip_last_steps` makes dense."""
    assert metadata.num_steps is not None
    return metadata.num_steps - (metadata.skip_first_steps or 0) - (metadata.skip_last_steps or 0)
