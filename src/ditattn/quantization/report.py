"""What was quantised: layers, bytes, and what stayed as it was, per component of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["ComponentQuantization", "QuantizationReport"]

MIB = 2**20


@dataclass(frozen=True)
class ComponentQuantization:
    """What was done with one component.

    Attributes:
        kinds: layers by format, such as mxfp4, W4A4_MXFP4_DUALSCALE.
        layers: how many are quantised.
        ran: how many of them have run since.
        skipped: layers that the user or the checkpoint left out.
        left_alone: further layers that stay as they were, with the reason.
        bytes_before, bytes_after: of the quantised layers' weights, as they were and as they are stored now.
        originals: where the weights are that an undo brings back.
        implementations: what computes them on the device they are on.
    """

    kinds: dict[str, int]
    layers: int
    ran: int
    skipped: list[str]
    left_alone: dict[str, str]
    bytes_before: int
    bytes_after: int
    originals: str
    implementations: list[str]

    @property
    def bytes_saved(self) -> int:
        """Of the device's memory, for the weights."""
        return self.bytes_before - self.bytes_after

    def sentence(self) -> str:
        """One line for people."""
        if not self.layers:
            return f"no linear layer; {len(self.skipped)} skipped"
        kinds = ", ".join(f"{count} in {kind}" for kind, count in self.kinds.items())
        ran = "all ran" if self.ran == self.layers else f"{self.ran} ran"
        sizes = f"{self.bytes_before / MIB:.1f} -> {self.bytes_after / MIB:.1f} MiB, {self.bytes_saved / MIB:.1f} MiB less"
        parts = [f"{self.layers} linear layers ({kinds}), {ran}; weights {sizes}, originals {self.originals}"]
        parts += [f"by {', '.join(self.implementations)}"] if self.implementations else []
        parts += [f"{len(self.skipped)} skipped"] if self.skipped else []
        reasons = dict.fromkeys(self.left_alone.values())
        parts += [
            f"left as they were: {', '.join(p for p, why in self.left_alone.items() if why == reason)}: {reason}" for reason in reasons
        ]
        return "; ".join(parts)


@dataclass(frozen=True)
class QuantizationReport:
    """Reports of all components.

    Attributes:
        components: by name in the pipeline.
        not_served: components left as they were, with the reason.
    """

    components: dict[str, ComponentQuantization]
    not_served: dict[str, str]

    @property
    def bytes_saved(self) -> int:
        return sum(component.bytes_saved for component in self.components.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "components": {name: {**vars(one), "bytes_saved": one.bytes_saved} for name, one in self.components.items()},
            "not_served": dict(self.not_served),
            "bytes_saved": self.bytes_saved,
        }

    def summary(self) -> str:
        """A line per component."""
        lines = [f"quantisation ({name}): {component.sentence()}" for name, component in self.components.items()]
        lines += [f"quantisation ({name}): not served: {reason}" for name, reason in self.not_served.items()]
        return "\n".join(lines)
