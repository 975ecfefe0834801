"""The most memory that a stretch of work took."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["PeakMemory", "peak_memory"]

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")

# what Linux takes for "forget the peak of the resident set"
RESET_PEAK = "5"


@dataclass
class PeakMemory:
    """There when the stretch has ended.

    Attributes:
        peak_mb: MiB; None where the machine does not tell.
        counts: what was counted.
    """

    peak_mb: float | None = None
    counts: str = "not measured on this device"


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the peak of the block: what torch allocated on an accelerator, the process's resident set on a Linux CPU."""
    found = PeakMemory()
    module: Any = None if device.type == "cpu" else getattr(torch, device.type, None)
    if hasattr(module, "reset_peak_memory_stats"):
        module.reset_peak_memory_stats(device)
        yield found
        found.peak_mb, found.counts = module.max_memory_allocated(device) / 2**20, f"allocated by torch on {device.type}"
        return
    resets = device.type == "cpu" and _forget_peak()
    yield found
    if resets:
        found.peak_mb, found.counts = _resident_peak_mb(), "resident set of the process, weights included"


def _forget_peak() -> bool:
    """True if the next reading will be the peak from here on."""
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:
        return False
    return STATUS.exists()


def _resident_peak_mb() -> float | None:
    line = next((line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")), None)
    return None if line is None else float(line.split()[1]) / 1024
