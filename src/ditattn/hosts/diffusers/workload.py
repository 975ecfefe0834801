"""A diffusers pipeline as a workload of comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ditattn.backends.setting import Setting
from ditattn.compare.setting import REFERENCE, Clip
from ditattn.compare.workload import Rendered, Workload
from ditattn.hosts.diffusers.call import call_defaults, call_pipeline
from ditattn.hosts.diffusers.install import denoisers, install_setting, serve
from ditattn.hosts.diffusers.quantize import quantize_setting
from ditattn.models import family_of, unwrapped
from ditattn.runtime.probe import CellReading, SparseProbe
from ditattn.runtime.stage import ServedModel

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
        asked = setting.quantization
        with (
            nullcontext() if asked is None else quantize_setting(self.pipe, asked) as quantized,
            install_setting(self.pipe, setting, strict=self.strict) as handle,
        ):
            frames, times = call_pipeline(self.pipe, arguments, seed=clip.seed)
            report = None if quantized is None else quantized.report()
            densities, orders = handle.overall_densities(), handle.head_orders()
            return Rendered(frames, times.stages, times.steps, handle.report(), densities, orders, report)

    def probe(self, settings: Sequence[Setting], clip: Clip) -> list[list[CellReading]]:
        probe = SparseProbe([_sparse_models(self.pipe, setting) for setting in settings])
        with install_setting(self.pipe, REFERENCE) as handle:
            handle.watch(probe)
            call_pipeline(self.pipe, self.arguments(clip.prompt), seed=clip.seed)
        return [probe.readings(number) for number in range(len(settings))]


def _sparse_models(pipe: Any, setting: Setting) -> dict[str, ServedModel]:
    """The denoisers that the setting serves with a sparse backend; the others, and unknown models, have no readings."""
    served = {}
    for name, module in denoisers(pipe).items():
        module = unwrapped(module)
        family = family_of(module)
        if family is not None:
            served[name] = serve(module, name, family, setting)
    return {name: model for name, model in served.items() if model.backend.is_sparse}
