"""A diffusers pipeline as a workload of comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ditattn.backends.setting import Setting
from ditattn.compare.merging import mean_densities, merged_orders, merged_readings
from ditattn.compare.rank_group import ALONE, RankGroup
from ditattn.compare.setting import REFERENCE, Clip
from ditattn.compare.workload import Rendered, Workload
from ditattn.errors import ConfigError
from ditattn.hosts.diffusers.call import OnStep, call_defaults, call_pipeline, no_step
from ditattn.hosts.diffusers.install import denoisers, install_setting, serve
from ditattn.hosts.diffusers.parallel import sequence_split
from ditattn.hosts.diffusers.quantize import quantize_setting
from ditattn.hosts.diffusers.step_cache import add_step_cache
from ditattn.models import family_of, unwrapped
from ditattn.runtime.probe import CellReading, SparseProbe
from ditattn.runtime.served_model import ServedModel

__all__ = ["PipelineWorkload"]


@dataclass(frozen=True)
class PipelineWorkload(Workload):
    """A loaded pipeline and how to call it.

    Attributes:
        pipe: the pipeline.
        arguments: of its call, from a prompt.
        strict: see `install`.
        group: the ranks between which the pipeline's denoisers are split.
        on_step: called with the steps of a run that are done, and how many there are, after each of them.
    """

    pipe: Any
    arguments: Callable[[str], Mapping[str, Any]]
    strict: bool = False
    group: RankGroup = ALONE
    on_step: OnStep = no_step

    @property
    def ranks(self) -> RankGroup:
        return self.group

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
            self._step_cache(setting, arguments),
            install_setting(self.pipe, setting, strict=self.strict) as handle,
        ):
            frames, times = call_pipeline(self.pipe, arguments, seed=clip.seed, on_step=self.on_step)
            report = None if quantized is None else quantized.report()
            densities = mean_densities(self.group.all_gather(handle.overall_densities()))
            orders = merged_orders(self.group.all_gather(handle.head_orders()), _ulysses_degree(self.pipe))
            return Rendered(frames, times.stages, times.steps, handle.report(), densities, orders, report)

    def _step_cache(self, setting: Setting, arguments: Mapping[str, Any]) -> ExitStack:
        """The setting's cache is on; closing switches it off, and with it goes what it kept."""
        on = ExitStack()
        if setting.step_cache is not None:
            num_steps = arguments.get("num_inference_steps", call_defaults(type(self.pipe)).get("num_inference_steps"))
            on.callback(add_step_cache(self.pipe, setting.step_cache, num_steps))
        return on

    def probe(self, settings: Sequence[Setting], clip: Clip) -> list[list[CellReading]]:
        if any(setting.step_cache != settings[0].step_cache for setting in settings):
            raise ConfigError("one probe is one run, under one step cache: these settings have several")
        probe, arguments = SparseProbe([_sparse_models(self.pipe, setting) for setting in settings]), self.arguments(clip.prompt)
        with self._step_cache(settings[0], arguments), install_setting(self.pipe, REFERENCE) as handle:
            handle.watch(probe)
            call_pipeline(self.pipe, arguments, seed=clip.seed, on_step=self.on_step)
        by_rank = self.group.all_gather([probe.readings(number) for number in range(len(settings))])
        return [merged_readings(of_setting) for of_setting in zip(*by_rank, strict=True)]


def _ulysses_degree(pipe: Any) -> int:
    splits = [split for module in denoisers(pipe).values() if (split := sequence_split(module)) is not None]
    return splits[0].ulysses if splits else 1


def _sparse_models(pipe: Any, setting: Setting) -> dict[str, ServedModel]:
    """The denoisers that the setting serves with a sparse backend; the others, and unknown models, have no readings."""
    served = {}
    for name, module in denoisers(pipe).items():
        module = unwrapped(module)
        family = family_of(module)
        if family is not None:
            served[name] = serve(module, name, family, setting)
    return {name: model for name, model in served.items() if model.backend.is_sparse}
