"""Videos that are made section after section: earlier frames at several sizes stand before the section's own."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from ditattn.models.base import TokenLayout
from ditattn.plan.token_grids import TokenGrid

__all__ = ["behind_history"]

Patch = tuple[int, int, int]


def behind_history(
    latents: Tensor, patch: Patch, history: Iterable[tuple[Tensor | None, Patch]], num_suffix_tokens: int = 0
) -> TokenLayout:
    """The layout of a section's video behind its history, of which every part is a grid of its own.

    Args:
        latents: of the section, `(B, C, T, H, W)`.
        patch: frames, rows and columns of latents that make a token of it.
        history: (latents, patch) in the order in which they stand; None is left out. What does not fill a patch is padded to one.
        num_suffix_tokens: behind the video.
    """
    grids: list[TokenGrid] = []
    for part, size in history:
        if part is not None:
            tokens = tuple(math.ceil(length / p) for length, p in zip(part.shape[2:], size, strict=True))
            grids.append(TokenGrid(grids[-1].stop if grids else 0, (tokens[0], tokens[1], tokens[2])))
    prefix = grids[-1].stop if grids else 0
    batch, channels, frames, rows, columns = latents.shape
    return TokenLayout((batch, channels, frames, rows, columns), patch, prefix, num_suffix_tokens, tuple(grids))
