"""What the sparse methods share: what they know of a step, when they run densely, the call path, and the base of their backends."""

from ditattn.backends.sparse.backend import SparseAttentionBackend
from ditattn.backends.sparse.dense_reasons import EXPECTED_REASONS, Reason, why_not_this_step
from ditattn.backends.sparse.impl import SparseAttentionImpl
from ditattn.backends.sparse.metadata import SparseAttentionMetadata, SparseAttentionMetadataBuilder, latent_grid

__all__ = [
    "EXPECTED_REASONS",
    "Reason",
    "SparseAttentionBackend",
    "SparseAttentionImpl",
    "SparseAttentionMetadata",
    "SparseAttentionMetadataBuilder",
    "latent_grid",
    "why_not_this_step",
]
