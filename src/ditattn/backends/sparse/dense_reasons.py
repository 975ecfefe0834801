"""Why a sparse backend runs a call densely: the words for it, and what the step and the tokens of a call say."""

from __future__ import annotations

import torch

from ditattn.backends.sparse.metadata import SparseAttentionMetadata

__all__ = ["EXPECTED_REASONS", "Reason", "why_not_these_tokens", "why_not_this_step"]


class Reason:
    """Why a sparse backend ran a call densely. The words users read in reports."""

    SPARSITY_ZERO = "sparsity 0"
    STEP_UNKNOWN = "step unknown"
    FIRST_STEPS = "first steps"
    LAST_STEPS = "last steps"
    REFRESH = "refresh step"
    STEPS_UNKNOWN = "number of steps unknown"
    SKIPPED_LAYER = "skipped layer"
    LAYER_UNKNOWN = "layer unknown"
    SHORT = "short sequence"
    UNEQUAL_LENGTHS = "query and key lengths differ"
    UNKNOWN_GEOMETRY = "unknown geometry"
    TOKEN_COUNT = "token count does not match the grid"
    SPLIT_ELSEWHERE = "a part of the tokens alone: they are split between processes that are not known here"
    PADDED_VIDEO = "padding reaches into the video"


# conditions a user asked for; everything else makes strict=True raise
EXPECTED_REASONS = frozenset(
    {Reason.SPARSITY_ZERO, Reason.FIRST_STEPS, Reason.LAST_STEPS, Reason.REFRESH, Reason.SKIPPED_LAYER, Reason.SHORT}
)


def why_not_this_step(metadata: SparseAttentionMetadata) -> str | None:
    """Why every call of this step runs densely, one of `Reason`; None if some run sparse."""
    step, first, last = metadata.current_timestep, metadata.skip_first_steps, metadata.skip_last_steps
    if first is None or last is None or (last and metadata.num_steps is None):
        return Reason.STEPS_UNKNOWN
    if step is None:
        return Reason.STEP_UNKNOWN if first or last else None
    if step < first:
        return Reason.FIRST_STEPS
    if metadata.num_steps is not None and last and step >= metadata.num_steps - last:
        return Reason.LAST_STEPS
    return None


def why_not_these_tokens(query_tokens: int, key_tokens: int, metadata: SparseAttentionMetadata, device_type: str) -> str | None:
    """Why a call of so many queries and keys runs densely in every step, one of `Reason`; None if it may run sparse."""
    if query_tokens != (key_tokens if metadata.rows is None else metadata.rows.num_tokens):
        return Reason.UNEQUAL_LENGTHS
    if key_tokens < metadata.config.least_tokens(device_type):
        return Reason.SHORT
    if metadata.num_tokens is None:
        return Reason.UNKNOWN_GEOMETRY
    if key_tokens != metadata.num_tokens:
        return Reason.SPLIT_ELSEWHERE if key_tokens < metadata.num_tokens and _has_partners() else Reason.TOKEN_COUNT
    # another order puts the grids first and their tokens elsewhere: the leading keys of the model's order are then not the leading ones
    first_free = key_tokens - metadata.num_last_tokens
    if metadata.token_order != "raster" and min(metadata.known_key_lengths or (key_tokens,)) < first_free:
        return Reason.PADDED_VIDEO
    return None


def _has_partners() -> bool:
    """True in one of several processes that torch.distributed has brought together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
