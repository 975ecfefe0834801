"""What a comparison needs of a loaded pipeline. Hosts implement it; comparisons and searches know no host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ditattn.backends.setting import Setting
from ditattn.compare.rank_group import ALONE, RankGroup
from ditattn.compare.setting import Clip
from ditattn.quantization.report import QuantizationReport
from ditattn.runtime.probe import CellReading
from ditattn.runtime.report import AttentionReport

__all__ = ["Rendered", "Workload"]


@dataclass(frozen=True)
class Rendered:
    """One clip as a pipeline made it.

    Attributes:
        frames: `[F, H, W, 3]` uint8.
        stages_ms, steps_ms: times of the call's parts, and of its denoising steps.
        report: what the attention did; of several ranks, this one's.
        densities: by component: (step, layer, overall density); a dense call counts as 1. Means over the ranks.
        head_orders: by component and layer, the order of tokens that each key head chose, where heads choose; of all ranks' heads.
        quantization: what became of the linear layers; None if nothing was asked of them.
    """

    frames: np.ndarray[Any, Any]
    stages_ms: dict[str, float]
    steps_ms: list[float]
    report: AttentionReport
    densities: dict[str, list[tuple[int, int, float]]]
    head_orders: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    quantization: QuantizationReport | None = None


class Workload(ABC):
    """A loaded pipeline and how to call it."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def ranks(self) -> RankGroup:
        """The processes that make every run together; each of them has the frames."""
        return ALONE

    @property
    @abstractmethod
    def takes_num_inference_steps(self) -> bool:
        """True if the number of steps can be named in a call, as `num_inference_steps`."""

    @abstractmethod
    def render(self, setting: Setting, clip: Clip, **changes: Any) -> Rendered:
        """Make one clip under a setting. `changes` replace arguments of the pipeline's call.

        Raises:
            DitattnError: the setting or the call cannot be honoured.
        """

    @abstractmethod
    def probe(self, settings: Sequence[Setting], clip: Clip) -> list[list[CellReading]]:
        """Make one clip densely and try every setting on its attention calls; returns the readings of each setting, of all ranks.

        All settings have the same step cache or none; it is on meanwhile, so that calls which it leaves out have no readings.

        Raises:
            DitattnError: as `render`.
        """
