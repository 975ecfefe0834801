"""Which denoising step is running, from the best source that a pipeline offers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ditattn.errors import ConfigError

__all__ = ["Step", "StepClock", "step"]

# timesteps are compared with this tolerance; they are numbers between 0 and 1000
SAME_TIMESTEP = 1e-6

_local = threading.local()


@dataclass(frozen=True)
class Step:
    """One denoising step.

    Attributes:
        index: 0 first; None if no source knows.
        num_steps: steps of the run; None if unknown.
        source: "override", "cache_context", "scheduler", "timestep" or "none".
    """

    index: int | None
    num_steps: int | None
    source: str


@contextlib.contextmanager
def step(index: int, num_steps: int | None = None) -> Iterator[None]:
    """Say which step runs inside the block: for sampling loops that neither diffusers nor a scheduler drives.

    Args:
        index: 0 first.
        num_steps: steps of the run; None if unknown.

    Raises:
        ConfigError: the index is negative, or not below `num_steps`.
    """
    if index < 0 or (num_steps is not None and index >= num_steps):
        raise ConfigError(f"step {index} of {'an unknown number of' if num_steps is None else num_steps} steps: the first one is 0")
    before = getattr(_local, "override", None)
    _local.override = Step(index, num_steps, "override")
    try:
        yield
    finally:
        _local.override = before


class StepClock:
    """One per pipeline, shared by all its denoisers, so that the two transformers of Wan 2.2 share one count.

    Sources, best first: `step(...)`, diffusers' `cache_context(step_index=...)`, `scheduler.step_index`, a change of the `timestep`
    argument.

    Args:
        scheduler: returns the pipeline's scheduler; called at every forward, since users replace `pipe.scheduler`.
    """

    def __init__(self, scheduler: Callable[[], Any] | None = None) -> None:
        self._scheduler = scheduler
        self.reset()

    def reset(self) -> None:
        """Forget the run: the next forward is step 0 of a new one."""
        self._last_timestep: float | None = None
        self._count = -1
        self._calls_before_first_step: dict[str | None, int] = {}

    def read(self, cache_context: Any, branch: str | None, timestep: Any) -> Step:
        """The step of the forward that begins now.

        Args:
            cache_context: what diffusers pushed (a string, an object with `step_index`, or None).
            branch: name of the CFG branch, or None.
            timestep: the forward's timestep argument: a number or a tensor of any shape.
        """
        override: Step | None = getattr(_local, "override", None)
        if override is not None:
            return override
        scheduler = self._scheduler() if self._scheduler else None
        num_steps = None if getattr(scheduler, "timesteps", None) is None else len(scheduler.timesteps)  # type: ignore[union-attr]
        if getattr(cache_context, "step_index", None) is not None:
            return Step(int(cache_context.step_index), cache_context.num_inference_steps or num_steps, "cache_context")
        if getattr(scheduler, "timesteps", None) is not None and hasattr(scheduler, "_step_index"):
            return self._from_scheduler(scheduler, branch, timestep)
        if timestep is None:
            return Step(None, num_steps, "none")
        self._watch(timestep)
        return Step(self._count, num_steps, "timestep")

    def _from_scheduler(self, scheduler: Any, branch: str | None, timestep: Any) -> Step:
        num_steps = len(scheduler.timesteps)
        if scheduler.step_index is not None:
            self._calls_before_first_step = {}
            return Step(int(scheduler.step_index), num_steps, "scheduler")
        # None: nobody called step() since set_timesteps(). That is step 0, unless the pipeline steps deep copies of its scheduler,
        # which shows in a second call of the same branch at another timestep.
        calls = self._calls_before_first_step[branch] = self._calls_before_first_step.get(branch, 0) + 1
        if timestep is not None:
            self._watch(timestep)
        if calls == 1 or self._count <= 0:
            return Step(getattr(scheduler, "begin_index", None) or 0, num_steps, "scheduler")
        return Step(self._count, num_steps, "timestep")

    def _watch(self, timestep: Any) -> None:
        """Count changes of the timestep: lower is the next step, higher a new run. Reads the device once."""
        # the largest entry also serves per-token timesteps (Wan 2.2 TI2V), whose conditioned tokens stand at 0
        value = float(timestep.detach().reshape(-1).max()) if isinstance(timestep, torch.Tensor) else float(timestep)
        if self._last_timestep is None or value > self._last_timestep + SAME_TIMESTEP:
            self._count = 0
        elif value < self._last_timestep - SAME_TIMESTEP:
            self._count += 1
        self._last_timestep = value
