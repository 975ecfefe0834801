"""CPU."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ditattn.devices.base import Device

__all__ = ["Cpu", "cpuinfo", "multiplies_bfloat16", "slow_dtype"]

# products that take this many times as long as in fp32 are worth a warning
SLOW_FACTOR = 10.0
PRODUCT_SIZE = 512
# of /proc/cpuinfo
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


class Cpu(Device):
    device_type = "cpu"

    def device_name(self) -> str:
        return cpuinfo().get("model name") or platform.processor() or platform.machine()

    def memory_bytes(self) -> int | None:
        if "SC_PHYS_PAGES" not in os.sysconf_names:
            return None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cpuinfo() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo; empty where the system has no such file."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def multiplies_bfloat16() -> bool:
    """True if this CPU has instructions that multiply bfloat16, and torch may use them."""
    flags = cpuinfo().get("flags", "").split()
    # ATEN_CPU_CAPABILITY keeps torch from them
    return not BFLOAT16_FLAGS.isdisjoint(flags) and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def slow_dtype(dtype: torch.dtype, rate: Callable[[torch.dtype], float] | None = None) -> str | None:
    """Why this CPU should not be asked to compute in `dtype`, in one sentence with the figures; None if it multiplies it well enough.

    Processors without instructions for half precision convert every number, so that torch's matrix products take up to a hundred times as
    long as in fp32. Measured on a small product, some milliseconds, half a second where the dtype is slow.

    Args:
        dtype: of the model's weights.
        rate: measures GFLOP/s of matrix products in a dtype; None measures torch's own.
    """
    rate = rate or _product_rate
    asked, single = rate(dtype), rate(torch.float32)
    if asked * SLOW_FACTOR >= single:
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"torch multiplies {name} matrices {single / asked:.0f} times slower than float32 on this CPU ({asked:.3g} against {single:.3g} "
        f"GFLOP/s): it has no instructions for {name}, so float32 will be much faster"
    )


def _product_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of the better one of two products of matrices of 512 x 512."""
    a = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype)
    best_s = math.inf
    for _ in range(2):
        start_s = time.perf_counter()
        torch.mm(a, a)
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * PRODUCT_SIZE**3 / best_s / 1e9
