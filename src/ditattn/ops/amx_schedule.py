"""Which of the two schedules of the bf16 kernel for AMX is faster on this machine, found out by timing both once.

`sequential` forms the scores of a visit, its weights and its output one after the other (csrc/cpu/amx.h). `overlapped` forms weights while
the tile unit multiplies (csrc/cpu/amx_overlapped.h). Their results differ by rounding. Each head size is measured once per process, on one
thread, in ten runs of 0.5 GFLOP (at D 128); a call that names its implementation (`cpu_sequential`, `cpu_overlapped`) measures nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ditattn.ops.calls import DenseCall

__all__ = ["Measurement", "found", "measurement"]

Run = Callable[[DenseCall, bool], object]
"""Runs a call of bf16 tensors, overlapped or not."""

# near a tie the choice, and with it the last bits of the result, must not change from run to run
CLEARLY_FASTER = 1.1
ROUNDS = 5
TOKENS = 1024


@dataclass(frozen=True)
class Measurement:
    """Fastest runs of one head size in milliseconds, since a busy machine only ever adds time."""

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
    if head_dim not in _MEASURED:
        # in a thread of its own, away from the caller's modes: a profiler or a mode that counts operations would see these calls
        with ThreadPoolExecutor(1, "ditattn-self-measurement") as pool:
            # where two threads ask at once, the first answer is that of both
            _MEASURED.setdefault(head_dim, pool.submit(_measure, head_dim, run).result())
    return _MEASURED[head_dim]


@torch.inference_mode()
def _measure(head_dim: int, run: Run) -> Measurement:
    # OpenMP counts threads per thread
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, TOKENS, 1, head_dim, generator=generator).bfloat16() for _ in range(3))
    call = DenseCall(query, key, value, head_dim**-0.5, False, None)
    rounds = [(_time_ms(run, call, False), _time_ms(run, call, True)) for _ in range(ROUNDS)]
    return Measurement(head_dim, *map(min, zip(*rounds, strict=True)))


def _time_ms(run: Run, call: DenseCall, overlapped: bool) -> float:
    start_s = time.perf_counter()
    run(call, overlapped)
    return 1e3 * (time.perf_counter() - start_s)
