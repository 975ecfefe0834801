"""Block means spelled out: one block at a time, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def run(x: Tensor, block_size: int) -> Tensor:
    return torch.stack([part.double().mean(1).float() for part in x.split(block_size, dim=1)], dim=1)
