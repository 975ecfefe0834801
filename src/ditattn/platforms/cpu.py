"""CPU: every backend runs."""

from __future__ import annotations

import os
import platform as python_platform
from pathlib import Path

from ditattn.platforms.interface import Platform

__all__ = ["CpuPlatform"]


class CpuPlatform(Platform):
    device_type = "cpu"

    def device_name(self) -> str:
        names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
        return names[0] if names else python_platform.processor() or python_platform.machine()

    def memory_bytes(self) -> int | None:
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError, AttributeError):
            return None


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
