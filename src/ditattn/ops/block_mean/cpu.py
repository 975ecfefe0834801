"""Block means through the compiled CPU kernel: one pass over the input."""

from __future__ import annotations

from torch import Tensor

from ditattn.ops import cpu_call


def run(x: Tensor, block_size: int, order: Tensor | None = None) -> Tensor:
    return cpu_call.block_mean(x, block_size, order)
