"""One run of a pipeline under one setting, and everything measured about it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ditattn.backends.config import SparseAttentionConfig
from ditattn.backends.setting import Setting
from ditattn.compare.memory import peak_memory
from ditattn.compare.setting import Clip
from ditattn.compare.workload import Workload

__all__ = ["Run", "run_clip", "warm_up"]

# enough for every kind of call to be met once, kernels built and buffers allocated
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Run:
    """What one call of the pipeline made and cost.

    Attributes:
        frames: `[F, H, W, 3]` uint8.
        total_ms: the whole call; `stages_ms` and `steps_ms` its parts.
        attention_ms: in self-attention, order and selection included.
        attention: the attention report as plain values; `summary` the same in words.
        densities: by component: [step, layer, overall density]; a dense call counts as 1.
        peak_memory_mb: MiB, None where unknown; `memory_counts` says of what.
        measured_at: UTC.
        cached: it was made by an earlier comparison.
        quantization: what became of the linear layers, as plain values; None if nothing was asked of them.
    """

    frames: np.ndarray[Any, Any]
    total_ms: float
    stages_ms: dict[str, float]
    steps_ms: list[float]
    attention_ms: float
    attention: dict[str, Any]
    summary: str
    densities: dict[str, list[list[Any]]]
    peak_memory_mb: float | None
    memory_counts: str
    measured_at: str
    cached: bool = False
    quantization: dict[str, Any] | None = None

    @property
    def overall_density(self) -> float | None:
        """Mean density over all calls of self-attention, a dense one counting as 1; None if step or layer of every call is unknown."""
        found = [density for cells in self.densities.values() for _, _, density in cells]
        return sum(found) / len(found) if found else None

    @property
    def attention_calls(self) -> int:
        """Calls of self-attention that ran; a step cache leaves some out."""
        return sum(part["calls"] for part in self.attention["components"].values())

    @property
    def sparse_density(self) -> float | None:
        """Mean density over the calls that ran sparse; None if none did."""
        parts = [part for part in self.attention["components"].values() if part["sparse_density"] is not None]
        calls = sum(part["sparse"] for part in parts)
        return sum(part["sparse_density"] * part["sparse"] for part in parts) / calls if calls else None


def run_clip(workload: Workload, setting: Setting, clip: Clip, **changes: Any) -> Run:
    """Make one clip and measure it. `changes` replace arguments of the pipeline's call.

    Raises:
        DitattnError: see `Workload.render`.
    """
    with peak_memory(workload.device) as memory:
        made = workload.render(setting, clip, **changes)
    return Run(
        frames=made.frames,
        total_ms=sum(made.stages_ms.values()),
        stages_ms=made.stages_ms,
        steps_ms=made.steps_ms,
        attention_ms=made.report.attention_ms,
        attention=made.report.as_dict(),
        summary="\n".join([made.report.summary(), *([] if made.quantization is None else [made.quantization.summary()])]),
        densities={name: [list(cell) for cell in cells] for name, cells in made.densities.items()},
        peak_memory_mb=memory.peak_mb,
        memory_counts=memory.counts,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        quantization=None if made.quantization is None else made.quantization.as_dict(),
    )


def warm_up(workload: Workload, setting: Setting, clip: Clip) -> None:
    """Run a few steps, sparse ones from the first on, so that nothing is built or allocated for the first time while the clock runs."""
    changes = {"num_inference_steps": WARM_UP_STEPS} if workload.takes_num_inference_steps else {}
    if isinstance(setting.config, SparseAttentionConfig):
        setting = setting.with_keys(skip_first_steps=0, skip_last_steps=0)
    run_clip(workload, setting, clip, **changes)
