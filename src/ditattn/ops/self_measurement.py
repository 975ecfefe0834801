"""How the package finds out which of several implementations is faster on this machine: each kind of call once per process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["fastest_ms", "measured_once"]

Kind = TypeVar("Kind")
Measured = TypeVar("Measured")


def measured_once(kept: dict[Kind, Measured], kind: Kind, measure: Callable[[], Measured]) -> Measured:
    """What `kept` has for a kind of call, measured now if it has nothing."""
    if kind not in kept:
        # in a thread of its own, away from the caller's mode: under fake tensors, or while a graph is traced, nothing can be timed
        with ThreadPoolExecutor(1, "ditattn-self-measurement") as pool:
            # where two threads ask at once, the first answer is that of both
            kept.setdefault(kind, pool.submit(measure).result())
    return kept[kind]


def fastest_ms(runs: Sequence[Callable[[], object]], rounds: int) -> tuple[float, ...]:
    """The fastest run of each in milliseconds, since a busy machine only ever adds time. They run in turns."""
    times = [tuple(_time_ms(run) for run in runs) for _ in range(rounds)]
    return tuple(map(min, zip(*times, strict=True)))


@torch.inference_mode()
def _time_ms(run: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start_s)
