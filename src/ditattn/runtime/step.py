"""Which denoising step is running, from the best source that a pipeline offers."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ditattn.arguments import described
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
        source: "override", "cache_context", "scheduler", "schedule", "timestep" or "none"; the name of a host that counts its steps itself.
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
        ConfigError: no whole numbers, or an index that is negative or not below `num_steps`.

    Examples:
        >>> import ditattn, torch
        >>> from diffusers import DiffusionPipeline
        >>> transformer = DiffusionPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers").transformer
        >>> latents, text = torch.randn(1, 16, 5, 28, 40), torch.randn(1, 512, transformer.config.text_dim)
        >>> with ditattn.install(transformer, "permuted_sparse_attn", min_tokens=0) as handle, torch.no_grad():
        ...     for i in range(3):
        ...         with ditattn.step(i, 3):
        ...             noise = transformer(latents, torch.tensor([900 - 300 * i]), text, return_dict=False)[0]
        >>> handle.report().components[type(transformer).__name__].step_sources
        {'override': 3}
    """
    for name, value in (("index", index), ("num_steps", 1 if num_steps is None else num_steps)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"step: {name} must be a whole number, not {described(value)}")
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

    A step's index counts from the beginning of the schedule: a run that begins in the middle (image to image, video to video) begins with a
    later step. Sources, best first: `step(...)`, diffusers' `cache_context(step_index=...)`, `scheduler.step_index`, the place of the
    `timestep` argument in `scheduler.timesteps`, a change of that argument.

    Args:
        scheduler: returns the pipeline's scheduler; called at every forward, since users replace `pipe.scheduler`.
    """

    def __init__(self, scheduler: Callable[[], Any] | None = None) -> None:
        self._scheduler = scheduler
        self._schedule: tuple[Any, list[float]] | None = None
        self.reset()

    def another(self) -> StepClock:
        """One that reads the same scheduler and counts for itself."""
        clock = copy.copy(self)
        clock.reset()
        return clock

    def reset(self) -> None:
        """Forget the run: the next forward is step 0 of a new one."""
        self._last_timestep: float | None = None
        self._last_index: int | None = None
        self._count = -1
        self._is_share = True
        self._calls_before_first_step: dict[str | None, int] = {}

    def read(self, cache_context: Any, branch: str | None, timestep: Any, driver: Any = None) -> Step:
        """The step of the forward that begins now.

        Args:
            cache_context: what diffusers pushed (a string, an object with `step_index`, or None).
            branch: name of the CFG branch, or None.
            timestep: the forward's timestep argument: a number or a tensor of any shape.
            driver: the scheduler of the pipeline that is running; None if the host cannot tell, then a scheduler that stands still while
                the timesteps change is left out.
        """
        override: Step | None = getattr(_local, "override", None)
        if override is not None:
            return override
        scheduler = driver if driver is not None else self._scheduler() if self._scheduler else None
        known = getattr(scheduler, "timesteps", None) is not None
        num_steps = len(scheduler.timesteps) if known else None  # type: ignore[union-attr]
        if getattr(cache_context, "step_index", None) is not None:
            return Step(int(cache_context.step_index), cache_context.num_inference_steps or num_steps, "cache_context")
        if known and getattr(scheduler, "step_index", None) is not None:
            return self._from_index(scheduler, timestep, is_driver=driver is not None)
        if timestep is None:
            # nobody called step() since set_timesteps()
            return Step(0, num_steps, "scheduler") if hasattr(scheduler, "_step_index") else Step(None, num_steps, "none")
        value = _largest(timestep)
        self._watch(value)
        place = self._place(scheduler, value, _tolerance(timestep)) if known else None
        if place is not None:
            return Step(place, num_steps, "scheduler" if hasattr(scheduler, "_step_index") else "schedule")
        if known and hasattr(scheduler, "_step_index"):
            return self._before_first_step(scheduler, branch)
        return Step(self._count, num_steps, "timestep")

    def _from_index(self, scheduler: Any, timestep: Any, *, is_driver: bool) -> Step:
        self._calls_before_first_step = {}
        index, num_steps = int(scheduler.step_index), len(scheduler.timesteps)
        if is_driver or timestep is None:
            return Step(index, num_steps, "scheduler")
        # a loop of the user's own, or another pipeline that shares the model: it may step another scheduler
        moved = self._watch(_largest(timestep))
        stands_still = index >= num_steps or (moved and index == self._last_index)
        self._last_index = index
        return Step(self._count, None, "timestep") if stands_still else Step(index, num_steps, "scheduler")

    def _before_first_step(self, scheduler: Any, branch: str | None) -> Step:
        """Nobody called step() since set_timesteps(), and the timestep is none of the schedule's.

        That is where the schedule begins, unless the pipeline steps deep copies of its scheduler, which shows in a second call of the same
        branch at another timestep.
        """
        num_steps = len(scheduler.timesteps)
        calls = self._calls_before_first_step[branch] = self._calls_before_first_step.get(branch, 0) + 1
        if calls == 1 or self._count <= 0:
            return Step(getattr(scheduler, "begin_index", None) or 0, num_steps, "scheduler")
        return Step(self._count, num_steps, "timestep")

    def _watch(self, value: float) -> bool:
        """Count changes of the timestep: lower is the next step, higher a new run. True if it changed."""
        before, self._last_timestep = self._last_timestep, value
        self._is_share = self._is_share and value <= 1
        if before is None or value > before + SAME_TIMESTEP:
            self._count = 0
            return before is not None
        if value < before - SAME_TIMESTEP:
            self._count += 1
            return True
        return False

    def _place(self, scheduler: Any, value: float, tolerance: float) -> int | None:
        """Index of a timestep in the schedule; None if it is not there.

        Some models take it as a share of the training steps. So 1 may be the first step, and is unless this run had a larger one.
        """
        if self._schedule is None or self._schedule[0] is not scheduler.timesteps:
            # one transfer per schedule
            self._schedule = (scheduler.timesteps, [float(t) for t in torch.as_tensor(scheduler.timesteps).tolist()])
        training_steps = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
        readings = (value, value * training_steps) if training_steps else (value,)
        for wanted in reversed(readings) if self._is_share else readings:
            distances = [abs(t - wanted) for t in self._schedule[1]]
            nearest = min(range(len(distances)), key=distances.__getitem__, default=None)
            if nearest is not None and distances[nearest] <= SAME_TIMESTEP + tolerance * abs(wanted):
                return nearest
        return None


def _largest(timestep: Any) -> float:
    """Reads the device once. The largest entry also serves per-token timesteps (Wan 2.2 TI2V), whose conditioned tokens stand at 0."""
    return float(timestep.detach().reshape(-1).max()) if isinstance(timestep, torch.Tensor) else float(timestep)


def _tolerance(timestep: Any) -> float:
    """Relative: what rounding to the tensor's dtype can have moved the timestep by."""
    dtype = timestep.dtype if isinstance(timestep, torch.Tensor) and timestep.is_floating_point() else torch.float32
    return 4 * torch.finfo(dtype).eps
