"""Another arrangement of a call's tokens, in which a sparse method can serve it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn.functional import pad

from ditattn.backends.sparse import SparseAttentionMetadata
from ditattn.ops.calls import DenseCall
from ditattn.runtime.key_padding import VideoFirst

__all__ = ["Arrangement"]


@dataclass(frozen=True)
class Arrangement:
    """How a call is brought into a form that has as many queries as keys and padding at the end only.

    Attributes:
        metadata: of the call in this arrangement.
        order: the tokens' order where it is not the model's.
        extra_queries: how many tokens before and after the queries are keys only; queries of zeros stand in for them.
    """

    metadata: SparseAttentionMetadata
    order: VideoFirst | None
    extra_queries: tuple[int, int]

    def arranged(self, call: DenseCall) -> DenseCall:
        """The call in this arrangement; what its mask says is in the metadata."""
        query, key, value = call.query, call.key, call.value
        if any(self.extra_queries):
            query = pad(query, (0, 0, 0, 0, *self.extra_queries))
        if self.order is not None:
            query, key, value = map(self.order.arrange, (query, key, value))
        return replace(call, query=query, key=key, value=value, attn_mask=None)

    def arranged_output(self, out: Tensor) -> Tensor:
        """An output of the call as the model asked it, in this arrangement: zeros for the queries that stand in."""
        if any(self.extra_queries):
            out = pad(out, (0, 0, 0, 0, *self.extra_queries))
        return out if self.order is None else self.order.arrange(out)

    def answer(self, out: Tensor) -> Tensor:
        """The output of the call as the model asked it."""
        out = out if self.order is None else self.order.restore(out)
        before, behind = self.extra_queries
        return out[:, before : out.shape[1] - behind]
