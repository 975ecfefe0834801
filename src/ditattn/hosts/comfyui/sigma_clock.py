"""The step of a forward in ComfyUI's samplers."""

from __future__ import annotations

from typing import Any

from ditattn.runtime.step import Step, StepClock

__all__ = ["SigmaClock"]


class SigmaClock(StepClock):
    """The step of a forward is the place of its sigma in the sampler's schedule, both from `transformer_options`.

    Samplers of second order look at sigmas between two steps; those belong to the step that began before them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sigmas: tuple[object, list[float]] | None = None

    def read(self, cache_context: Any, branch: str | None, timestep: Any, driver: Any = None) -> Step:
        """`driver` is the forward's `transformer_options`. Reads the device once per forward."""
        sigmas, schedule = driver.get("sigmas"), driver.get("sample_sigmas")
        if sigmas is None or schedule is None:
            return Step(None, None, "none")
        if self._sigmas is None or self._sigmas[0] is not schedule:
            self._sigmas = (schedule, [float(sigma) for sigma in schedule.tolist()])
        steps = self._sigmas[1][:-1]
        if not steps:
            return Step(None, None, "none")
        sigma = float(sigmas.max())
        begun = [number for number, start in enumerate(steps) if start >= sigma * (1 - 1e-4)]
        return Step(begun[-1] if begun else 0, len(steps), "sigmas")
