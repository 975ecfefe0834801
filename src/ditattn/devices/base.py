"""What the package asks of a machine. One file per torch device type; facts only: no backend and no operation is known here."""

from __future__ import annotations

from typing import ClassVar

from ditattn.packages import Package

__all__ = ["Device"]


class Device:
    """A torch device type of this machine. Subclasses set the class attributes and override the probes."""

    device_type: ClassVar[str]
    packages: ClassVar[tuple[Package, ...]] = ()
    """What torch needs to see the device."""
    has_flash: ClassVar[bool] = True
    """A FlashAttention kernel is known for it."""

    def why_unavailable(self) -> str | None:
        """Why this machine has no such device, or None."""
        missing = [package.sentence() for package in self.packages if package.missing()]
        return "; ".join(missing) or None

    def device_name(self) -> str:
        """Name of the device for people."""
        return self.device_type

    def memory_bytes(self) -> int | None:
        """All memory of the device, free or not; None where nothing tells."""
        return None
