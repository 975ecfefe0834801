"""Attention masks that only hide padded keys, read as key lengths: at the end, or in the text before the video."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ditattn.backends.sparse import SparseAttentionMetadata
from ditattn.plan.split import GatheredTokens
from ditattn.plan.token_grids import TokenGrid, grids_of_sequence

__all__ = ["MASK_WITH_GAPS", "KeyPadding", "MaskReader", "VideoFirst", "broadcastable"]

MASK_WITH_GAPS = "mask with gaps"
OTHER_MASK = "mask that is not key padding"


class KeyPadding(NamedTuple):
    """How many leading keys of each batch element are real: integer `[B]`, and as the host read it."""

    key_lengths: Tensor
    known_key_lengths: tuple[int, ...]


Reading = tuple[KeyPadding | None, str | None]


@dataclass(frozen=True)
class VideoFirst:
    """Another order of the tokens of each batch element: the video and all other grids, the real text, the text that is padding.

    The order of the keys means nothing to attention, so that padding in front of the video becomes padding at the end.

    Attributes:
        places: int64 `[B, S]`: token `s` of the new order is token `places[b, s]` of the model's.
        inverse: int64 `[B, S]`, the way back.
        metadata: of a call in this order.
    """

    places: Tensor
    inverse: Tensor
    metadata: SparseAttentionMetadata

    def arrange(self, x: Tensor) -> Tensor:
        """`[B, S, H, D]` of the model's order in the new one."""
        return torch.take_along_dim(x, self.places[:, :, None, None], dim=1)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `arrange`."""
        return torch.take_along_dim(x, self.inverse[:, :, None, None], dim=1)

    def of_gathered(self, gathered: GatheredTokens) -> VideoFirst:
        """The same order of tokens that stand as ranks have gathered them."""
        places = gathered.places(self.places.device)[self.places]
        return VideoFirst(places, places.argsort(dim=1), replace(self.metadata, gathered=None))


class MaskReader:
    """Reads each mask once: models pass one mask to all layers, and reading it waits for the device. One per forward."""

    def __init__(self) -> None:
        self._found = WeakIdKeyDictionary()
        self._moved = WeakIdKeyDictionary()

    def read(self, mask: Tensor, key: Tensor) -> Reading:
        """(padding, None) if `mask` pads the end of the keys, (None, None) if it hides nothing, else (None, reason).

        Args:
            mask: `[B, T]`, or `[B, 1, 1, T]`, also after `expand`, B may be 1; other shapes and dtypes than bool are no key padding.
            key: `[B, T, H, D]`.
        """
        mask4 = _unexpanded(mask)
        if mask4.dtype != torch.bool or mask4.ndim != 4 or mask4.shape[1:3] != (1, 1) or mask4.shape[3] != key.shape[1]:
            return None, OTHER_MASK
        if mask not in self._found:
            self._found[mask] = _read(mask4[:, 0, 0], key.shape[0])
        found: Reading = self._found[mask]
        return found

    def video_first(self, mask: Tensor, key: Tensor, metadata: SparseAttentionMetadata) -> VideoFirst | None:
        """The order in which a mask with gaps pads the end of the keys; None if it hides a token of a grid, or there is no grid.

        Args:
            mask: as of `read`, which found gaps in it.
            key: `[B, T, H, D]`.
            metadata: of the call in the model's order.
        """
        if mask not in self._moved:
            keep = _unexpanded(mask)[:, 0, 0].expand(key.shape[0], -1)
            self._moved[mask] = _video_first(keep, metadata)
        found: VideoFirst | None = self._moved[mask]
        return found


def _video_first(keep: Tensor, metadata: SparseAttentionMetadata) -> VideoFirst | None:
    length, size = keep.shape[1], metadata.latent_shape
    if size is None or metadata.num_tokens != length:
        return None
    target, *others = grids_of_sequence(size, metadata.num_prefix_tokens, metadata.num_suffix_tokens, metadata.further_grids)
    in_grid = torch.zeros(length, dtype=torch.bool, device=keep.device)
    for grid in (target, *others):
        in_grid[grid.start : grid.stop] = True
    if not bool(keep[:, in_grid].all()):
        return None
    rank = 2 - keep.long()
    rank[:, in_grid] = 0
    places = rank.argsort(dim=1, stable=True)
    lengths = keep.sum(1)

    def moved_start(grid: TokenGrid) -> int:
        return sum(other.num_tokens for other in (target, *others) if other.start < grid.start)

    moved = replace(
        metadata,
        num_prefix_tokens=moved_start(target),
        num_suffix_tokens=length - moved_start(target) - target.num_tokens,
        further_grids=tuple(replace(grid, start=moved_start(grid)) for grid in others),
        key_lengths=lengths,
        known_key_lengths=tuple(lengths.tolist()),
    )
    return VideoFirst(places, places.argsort(dim=1), moved)


def broadcastable(mask: Tensor) -> Tensor:
    """A `[B, T]` key mask as `[B, 1, 1, T]`; others as they are."""
    return mask[:, None, None] if mask.ndim == 2 else mask


def _unexpanded(mask: Tensor) -> Tensor:
    """The same, and a mask that is expanded over heads and queries as the `[B, 1, 1, T]` that it was."""
    mask = broadcastable(mask)
    is_expanded = mask.ndim == 4 and all(mask.stride(axis) == 0 or mask.shape[axis] == 1 for axis in (1, 2))
    return mask[:, :1, :1] if is_expanded else mask


def _read(keep: Tensor, batch: int) -> Reading:
    if bool((keep[:, 1:] & ~keep[:, :-1]).any()):
        return None, MASK_WITH_GAPS
    lengths = keep.sum(-1).expand(batch).contiguous()
    known = tuple(lengths.tolist())
    return (None if min(known) == keep.shape[1] else KeyPadding(lengths, known)), None
