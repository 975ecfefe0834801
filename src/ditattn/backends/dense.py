"""What the dense backends share: one call of `dense_attention`, by the implementation that the backend asks for."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ditattn.backends.base import AttentionImpl, AttentionMetadata, CallRecord
from ditattn.ops.table import Implementation, names_of

__all__ = ["DENSE_BACKEND", "DenseAttentionImpl"]

# the reason that a report gives for calls of a backend that is dense by nature
DENSE_BACKEND = "dense backend"


class DenseAttentionImpl(AttentionImpl):
    """Every key of every query.

    Attributes:
        implementation: the implementation of `dense_attention` that the backend insists on; None takes the best one.
    """

    implementation: ClassVar[str | None] = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata) -> Tensor:
        names, reason = self.choose(query, key, attn_metadata)
        self._note(CallRecord(reason))
        return self._dense(query, key, value, attn_metadata.key_lengths, names)

    def rows(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata) -> dict[str, Implementation]:
        names, _ = self.choose(query, key, attn_metadata)
        return {"dense_attention": self._dense_rows.row(self._dense_call(query, key, value, attn_metadata.key_lengths), names)}

    def choose(self, query: Tensor, key: Tensor, metadata: AttentionMetadata) -> tuple[tuple[str, ...], str]:
        """Implementations for this call in order of preference, none to take the best one, and what the report says about it."""
        return names_of(self.implementation), DENSE_BACKEND
