"""The order in which the tokens of a layer's calls are blocked, kept from call to call."""

from __future__ import annotations

import torch
from torch import Tensor

from ditattn.backends.sparse.metadata import SparseAttentionMetadata
from ditattn.plan.block_plan import BLOCK_SIZE
from ditattn.plan.split import RowOrder
from ditattn.plan.token_order import TokenOrder, token_order

__all__ = ["LayerOrders"]


class LayerOrders:
    """The orders of one layer's tokens. Each serves until the tokens change."""

    def __init__(self) -> None:
        self._known_tokens: tuple[object, TokenOrder, Tensor] | None = None
        self._known_rows: tuple[object, RowOrder] | None = None

    def of_tokens(self, metadata: SparseAttentionMetadata, device: torch.device) -> tuple[TokenOrder, Tensor]:
        """The order of the tokens, and bool `[N]`, which of its blocks every plan keeps."""
        grid = metadata.latent_shape
        assert grid is not None
        facts = (metadata.token_order, grid, metadata.num_prefix_tokens, metadata.num_suffix_tokens, device, metadata.further_grids)
        whole_first_frame = metadata.whole_first_frames
        known = (facts, whole_first_frame, metadata.gathered)
        if self._known_tokens is None or self._known_tokens[0] != known:
            order = metadata.as_stored(token_order(*facts), device)
            self._known_tokens = (known, order, order.protected_blocks(BLOCK_SIZE, whole_first_frame, device))
        return self._known_tokens[1:]

    def of_rows(self, metadata: SparseAttentionMetadata, device: torch.device) -> RowOrder:
        """How this rank's queries stand in the order of all tokens."""
        assert metadata.rows is not None
        assert metadata.latent_shape is not None
        facts = (metadata.token_order, metadata.latent_shape, metadata.num_prefix_tokens, metadata.num_suffix_tokens, "cpu")
        known = (facts, metadata.further_grids, metadata.rows, device)
        if self._known_rows is None or self._known_rows[0] != known:
            self._known_rows = (known, metadata.rows.ordered(token_order(*facts, metadata.further_grids), device))
        return self._known_rows[1]
