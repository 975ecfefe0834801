"""CPU."""

from __future__ import annotations

import platform
from pathlib import Path

from ditattn.devices.base import Device

__all__ = ["Cpu", "cpuinfo"]


class Cpu(Device):
    device_type = "cpu"

    def device_name(self) -> str:
        return cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpuinfo() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo; empty where the system has no such file."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
