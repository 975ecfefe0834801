"""A diffusers pipeline as a workload of comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ditattn.backends.setting import Setting
from ditattn.compare.setting import Clip
from ditattn.compare.workload import Rendered, Workload
from ditattn.hosts.diffusers.call import call_defaults, call_pipeline
from ditattn.hosts.diffusers.install import install_setting
from ditattn.hosts.diffusers.probing import probe_run
from ditattn.runtime.probe import CellReading

__all__ = ["PipelineWorkload"]


@dataclass(frozen=True)
class PipelineWorkload(Workload):
    """A loaded pipeline and how to call it.

    Attributes:
        pipe: the pipeline.
        arguments: of its call, from a prompt.
        strict: see `install`.
    """

    pipe: Any
    arguments: Callable[[str], Mapping[str, Any]]
    strict: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device(self.pipe.device)

    @property
    def takes_num_inference_steps(self) -> bool:
        return "num_inference_steps" in call_defaults(type(self.pipe))

    def render(self, setting: Setting, clip: Clip, **changes: Any) -> Rendered:
        arguments = {**self.arguments(clip.prompt), **changes}
        with install_setting(self.pipe, setting, strict=self.strict) as handle:
            frames, times = call_pipeline(self.pipe, arguments, seed=clip.seed)
            return Rendered(frames, times.stages, times.steps, handle.report(), handle.overall_densities())

    def probe(self, settings: Sequence[Setting], clip: Clip) -> list[list[CellReading]]:
        return probe_run(self.pipe, self.arguments(clip.prompt), seed=clip.seed, settings=settings)
