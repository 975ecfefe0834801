"""Which forward of a run this is: runs are numbered, and so are the forwards of a step where nobody names their branches."""

from __future__ import annotations

from ditattn.plan.reuse import ForwardId

__all__ = ["ForwardCounter"]


class ForwardCounter:
    """One per pipeline, beside its StepClock."""

    def __init__(self) -> None:
        self._run = 0
        self._last_step: int | None = None
        self._unnamed: dict[str, int] = {}

    def end_run(self) -> None:
        """The next forward belongs to another run."""
        self._run += 1
        self._last_step = None
        self._unnamed = {}

    def goes_back(self, step: int | None) -> bool:
        """True if `step` was left already: the forward belongs to another run, whose beginning nobody announced."""
        return step is not None and self._last_step is not None and step < self._last_step

    def read(self, model: str, step: int | None, branch: str | None) -> ForwardId:
        """The forward of `model` that begins now.

        Args:
            model: its name in the pipeline.
            step: index of the step; None if unknown.
            branch: name of its branch; None if the host names none.
        """
        if step != self._last_step:
            self._last_step, self._unnamed = step, {}
        if branch is not None:
            return ForwardId(self._run, branch)
        number = self._unnamed.get(model, 0)
        self._unnamed[model] = number + 1
        return ForwardId(self._run, None, number)
