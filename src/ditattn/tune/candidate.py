"""One setting of a sparse backend, as the search moves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["TUNED_KEYS", "Candidate", "Outcome", "Target"]

TUNED_KEYS = ("sparsity", "skip_first_steps", "skip_last_steps", "skip_layers")
"""What the search sets. A preset would say nothing beside them."""


@dataclass(frozen=True, order=True)
class Candidate:
    """What to keep dense, and how much of the rest to drop.

    Attributes:
        sparsity: asked share of key blocks to drop.
        first_steps, last_steps: dense steps at both ends.
        layers: dense layers.
        whole_first_frame: leave `first_frame_sink` as it is; False switches it off.
    """

    sparsity: float
    first_steps: int = 0
    last_steps: int = 0
    layers: tuple[int, ...] = ()
    whole_first_frame: bool = True

    @property
    def keys(self) -> dict[str, Any]:
        """As keys of the backend's configuration."""
        found = {
            "sparsity": self.sparsity,
            "skip_first_steps": self.first_steps,
            "skip_last_steps": self.last_steps,
            "skip_layers": ",".join(map(str, self.layers)),
        }
        return found if self.whole_first_frame else {**found, "first_frame_sink": False}

    def words(self) -> str:
        """For people."""
        return ", ".join(
            f"{key}={value}" for key, value in self.keys.items() if key == "sparsity" or value is False or value not in (0, "")
        )

    def is_bolder_than(self, other: Candidate) -> bool:
        """True if it computes no more than `other` anywhere, so that what `other` missed it is taken to miss too."""
        return (
            self.sparsity >= other.sparsity
            and self.first_steps <= other.first_steps
            and self.last_steps <= other.last_steps
            and set(self.layers) <= set(other.layers)
            and self.whole_first_frame <= other.whole_first_frame
        )


@dataclass(frozen=True)
class Target:
    """What the worst clip must reach.

    Attributes:
        psnr: decibels.
        ssim: None asks for none.
    """

    psnr: float
    ssim: float | None = None

    def met_by(self, psnr: float, ssim: float | None) -> bool:
        return psnr >= self.psnr and (self.ssim is None or (ssim is not None and ssim >= self.ssim))

    def words(self) -> str:
        return f"PSNR at least {self.psnr:g} dB" + (f" and SSIM at least {self.ssim:g}" if self.ssim is not None else "")


@dataclass(frozen=True)
class Outcome:
    """What a candidate did.

    Attributes:
        psnr, ssim: of the worst clip that was run.
        time_share: its time over the dense time, median over the clips that were run.
        meets: the target is met on every clip. The first clip that misses it ends the run.
    """

    psnr: float
    ssim: float | None
    time_share: float
    meets: bool

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Outcome:
        return cls(float(values["psnr"]), values["ssim"], values["time_share"], values["meets"])

    def words(self) -> str:
        ssim = "" if self.ssim is None else f", SSIM {self.ssim:.4f}"
        psnr = "identical" if self.psnr == float("inf") else f"PSNR {self.psnr:.2f} dB"
        return f"{psnr}{ssim}, {1 / self.time_share:.2f}x, {'meets the target' if self.meets else 'misses the target'}"
