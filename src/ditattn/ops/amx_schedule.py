"""Which of the two schedules of the bf16 kernel for AMX is faster on this machine, found out by timing both once.

`sequential` forms the scores of a visit, its weights and its output one after the other (csrc/cpu/amx.h). `overlapped` forms weights while
the tile unit multiplies (csrc/cpu/amx_overlapped.h). Their results differ by rounding. Each head size is measured once per process, on one
thread, in ten runs of 0.5 GFLOP (at D 128); a call that names its implementation (`cpu_sequential`, `cpu_overlapped`) measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ditattn.ops.calls import DenseCall
from ditattn.ops.self_measurement import fastest_ms, measured_once

__all__ = ["Measurement", "found", "measurement"]

Run = Callable[[DenseCall, bool], object]
"""Runs a call of bf16 tensors, overlapped or not."""

# near a tie the choice, and with it the last bits of the result, must not change from run to run
CLEARLY_FASTER = 1.1
ROUNDS = 5
TOKENS = 1024


@dataclass(frozen=True)
class Measurement:
    """Fastest runs of one head size in milliseconds."""

    head_dim: int
    sequential_ms: float
    overlapped_ms: float

    @property
    def overlapped(self) -> bool:
        """Whether calls are served by the overlapped schedule."""
        return self.sequential_ms > CLEARLY_FASTER * self.overlapped_ms

    def sentence(self) -> str:
        """For people: both times, and what follows."""
        chosen = "overlapped" if self.overlapped else "sequential"
        return (
            f"AMX, head size {self.head_dim}: sequential {self.sequential_ms:.2f} ms, overlapped {self.overlapped_ms:.2f} ms, so {chosen}"
        )


_MEASURED: dict[int, Measurement] = {}


def found(head_dim: int) -> Measurement | None:
    """That of a head size, if one was made."""
    return _MEASURED.get(head_dim)


def measurement(head_dim: int, run: Run) -> Measurement:
    """That of a head size of the kernels: made by the first call, kept for later ones."""
    return measured_once(_MEASURED, head_dim, partial(_measure, head_dim, run))


def _measure(head_dim: int, run: Run) -> Measurement:
    # OpenMP counts threads per thread
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, TOKENS, 1, head_dim, generator=generator).bfloat16() for _ in range(3))
    call = DenseCall(query, key, value, head_dim**-0.5, False, None)
    return Measurement(head_dim, *fastest_ms([partial(run, call, False), partial(run, call, True)], ROUNDS))
