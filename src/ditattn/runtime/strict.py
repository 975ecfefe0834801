"""strict=True: calls that would run densely raise, unless a setting asks for it and leaves some steps sparse."""

from __future__ import annotations

from torch import Tensor

from ditattn.backends.sparse import EXPECTED_REASONS, SparseAttentionMetadata
from ditattn.errors import DenseInStrictMode
from ditattn.runtime.forward import Forward
from ditattn.runtime.run_share import KEYS, holds_for_the_run
from ditattn.runtime.self_attention import is_self_attention

__all__ = ["is_strict", "refuse_dense"]


def is_strict(forward: Forward, layer: int | None, query: Tensor, key: Tensor) -> bool:
    """True for the denoiser's self-attention in a strict stage."""
    return forward.stage.strict and is_self_attention(forward, layer, query, key)


def refuse_dense(forward: Forward, reason: str | None) -> None:
    """Raise DenseInStrictMode for a dense call that no setting asks for, or that shows that the whole run will be dense."""
    model, metadata = forward.model, forward.metadata
    if reason is None or not model.backend.is_sparse:
        return
    if reason not in EXPECTED_REASONS:
        raise DenseInStrictMode(f"{model.backend.name} on {model.name} would run densely in step {forward.step.index}: {reason}")
    if isinstance(metadata, SparseAttentionMetadata) and holds_for_the_run(reason, metadata, len(model.layers)):
        asked = f"{KEYS[reason]}={getattr(model.config, KEYS[reason])}"
        raise DenseInStrictMode(f"{model.backend.name} on {model.name} would run densely in every step: {reason} ({asked})")
