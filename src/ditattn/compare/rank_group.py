"""Several processes that make every run together, each a part of it: what they tell each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["ALONE", "RankGroup"]

T = TypeVar("T")


@dataclass(frozen=True)
class RankGroup:
    """The processes of one torch.distributed group; each calls the same methods in the same order.

    Attributes:
        rank: of this one.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def broadcast(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on every rank: clocks differ, decisions that follow from them must not."""
        if self.size == 1:
            return make()
        import torch.distributed as dist

        held: list[Any] = [make() if self.is_first else None]
        dist.broadcast_object_list(held, src=0)
        made: T = held[0]
        return made

    def all_gather(self, own: T) -> list[T]:
        """What every rank has, by rank."""
        if self.size == 1:
            return [own]
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, own)
        return gathered


ALONE = RankGroup()
"""One process."""
