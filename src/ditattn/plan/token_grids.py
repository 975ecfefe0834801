"""Grids of tokens in one sequence: the target, and the references, conditions or layers beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ditattn.errors import ConfigError

__all__ = ["TokenGrid", "grid_name", "grids_of_sequence"]


@dataclass(frozen=True)
class TokenGrid:
    """A video or an image within a sequence.

    Attributes:
        start: place of its first token.
        size: (F, Y, X) tokens, in raster order.
    """

    start: int
    size: tuple[int, int, int]

    @property
    def num_tokens(self) -> int:
        """F * Y * X."""
        return math.prod(self.size)

    @property
    def stop(self) -> int:
        """Place behind its last token."""
        return self.start + self.num_tokens


def grids_of_sequence(
    grid: tuple[int, int, int], num_prefix_tokens: int, num_suffix_tokens: int, further_grids: tuple[TokenGrid, ...]
) -> tuple[TokenGrid, ...]:
    """The target's grid, then the further ones as they stand in the sequence.

    Args:
        grid: (F, Y, X) of the target.
        num_prefix_tokens, num_suffix_tokens: all tokens before and after the target, those of further grids among them.
        further_grids: elsewhere in the sequence.

    Raises:
        ConfigError: a size that is not positive, or grids that overlap or reach beyond the sequence.
    """
    if min(grid) < 1 or num_prefix_tokens < 0 or num_suffix_tokens < 0:
        raise ConfigError(
            f"a token grid needs positive sizes, not {grid} with {num_prefix_tokens} prefix and {num_suffix_tokens} suffix tokens"
        )
    target = TokenGrid(num_prefix_tokens, (grid[0], grid[1], grid[2]))
    further = sorted(further_grids, key=lambda one: one.start)
    used = 0
    for one in sorted([target, *further], key=lambda one: one.start):
        if min(one.size) < 1 or one.start < used or one.stop > target.stop + num_suffix_tokens:
            raise ConfigError(
                f"a grid of {grid_name(one.size)} tokens cannot begin at token {one.start} of {target.stop + num_suffix_tokens}, "
                f"of which the first {used} are taken"
            )
        used = one.stop
    return (target, *further)


def grid_name(size: tuple[int, int, int]) -> str:
    """For reports: "21x30x52"."""
    return "x".join(map(str, size))
