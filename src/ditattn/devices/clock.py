"""Time spent on a device, summed without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Sums the time of many short stretches of work.

    On devices with a stream (cuda, npu, xpu) the stretches are bracketed by events, and only `total_ms` waits for them; elsewhere the
    host's clock is read, which is exact for the CPU.
    """

    def __init__(self) -> None:
        self._host_ms = 0.0
        self._events: list[tuple[Any, Any, int]] = []

    def measure(self, device: torch.device) -> AbstractContextManager[None]:
        """Add the time of the block, which runs on `device`."""
        return self._count(device, 1)

    def leave_out(self, device: torch.device) -> AbstractContextManager[None]:
        """Take away the time of the block, which runs within one that is measured."""
        return self._count(device, -1)

    @contextmanager
    def _count(self, device: torch.device, sign: int) -> Iterator[None]:
        stream = getattr(torch, device.type, None)
        event_cls = getattr(stream, "Event", None) if device.type != "cpu" else None
        if event_cls is None:
            start_s = time.perf_counter()
            yield
            self._host_ms += sign * (time.perf_counter() - start_s) * 1e3
            return
        start, end = event_cls(enable_timing=True), event_cls(enable_timing=True)
        start.record()
        yield
        end.record()
        self._events.append((start, end, sign))

    def total_ms(self) -> float:
        """Milliseconds so far. Waits for the device."""
        for start, end, sign in self._events:
            end.synchronize()
            self._host_ms += sign * float(start.elapsed_time(end))
        self._events.clear()
        return self._host_ms
