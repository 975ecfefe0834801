"""Attention masks that only hide padded keys at the end, read as key lengths."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["KeyPadding", "MaskReader", "broadcastable"]

MASK_WITH_GAPS = "mask with gaps"
OTHER_MASK = "mask that is not key padding"


class KeyPadding(NamedTuple):
    """How many leading keys of each batch element are real: integer `[B]`, and as the host read it."""

    key_lengths: Tensor
    known_key_lengths: tuple[int, ...]


Reading = tuple[KeyPadding | None, str | None]


class MaskReader:
    """Reads each mask once: models pass one mask to all layers, and reading it waits for the device. One per forward.

    Args:
        of_pairs: masks are `[B, 1, S, S]`, true where both tokens are real, and every layer makes the same one anew.
    """

    def __init__(self, of_pairs: bool = False) -> None:
        self._of_pairs = of_pairs
        self._found = WeakIdKeyDictionary()
        self._found_of_pairs: dict[torch.Size, Reading] = {}

    def read(self, mask: Tensor, key: Tensor) -> Reading:
        """(padding, None) if `mask` pads the end of the keys, (None, None) if it hides nothing, else (None, reason).

        Args:
            mask: `[B, T]` or `[B, 1, 1, T]`, B may be 1, or where masks are of pairs `[B, 1, T, T]`; other shapes and dtypes than bool
                are no key padding.
            key: `[B, T, H, D]`.
        """
        mask4 = broadcastable(mask)
        if self._of_pairs and mask4.dtype == torch.bool and mask4.ndim == 4 and mask4.shape[1:] == (1, key.shape[1], key.shape[1]):
            if mask4.shape not in self._found_of_pairs:
                self._found_of_pairs[mask4.shape] = _read_pairs(mask4[:, 0], key.shape[0])
            return self._found_of_pairs[mask4.shape]
        if mask4.dtype != torch.bool or mask4.ndim != 4 or mask4.shape[1:3] != (1, 1) or mask4.shape[3] != key.shape[1]:
            return None, OTHER_MASK
        if mask not in self._found:
            self._found[mask] = _read(mask4[:, 0, 0], key.shape[0])
        found: Reading = self._found[mask]
        return found


def broadcastable(mask: Tensor) -> Tensor:
    """A `[B, T]` key mask as `[B, 1, 1, T]`; others as they are."""
    return mask[:, None, None] if mask.ndim == 2 else mask


def _read_pairs(both: Tensor, batch: int) -> Reading:
    """The first token sees every real one, and a real token sees itself: `both` is `[B, S, S]`."""
    keep = both.diagonal(dim1=1, dim2=2)
    return _read(keep, batch) if torch.equal(both[:, 0], keep) else (None, OTHER_MASK)


def _read(keep: Tensor, batch: int) -> Reading:
    if bool((keep[:, 1:] & ~keep[:, :-1]).any()):
        return None, MASK_WITH_GAPS
    lengths = keep.sum(-1).expand(batch).contiguous()
    known = tuple(lengths.tolist())
    return (None if min(known) == keep.shape[1] else KeyPadding(lengths, known)), None
