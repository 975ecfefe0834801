"""What is kept between the forwards of one run: apart for every run that goes on at the time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.utils.weak import WeakIdKeyDictionary

from ditattn.backends.base import AttentionImpl, AttentionMetadata
from ditattn.runtime.branches import ForwardCounter
from ditattn.runtime.run_share import RunShare
from ditattn.runtime.step import StepClock

__all__ = ["Run", "Runs"]


@dataclass(eq=False)
class Run:
    """One run, and after it the next one of the same runner.

    Attributes:
        clock: tells its steps.
        metadata: of its step, by denoiser and whether the text is left out, with what each was built from.
        impls: one per denoiser, layer and call signature: what they remember (plans, orders, residuals) is of this run's pictures.
    """

    clock: StepClock
    metadata: dict[tuple[str, bool], tuple[tuple[Any, ...], AttentionMetadata]] = field(default_factory=dict)
    forwards: ForwardCounter = field(default_factory=ForwardCounter)
    share: RunShare = field(default_factory=RunShare)
    impls: dict[tuple[Any, ...], AttentionImpl] = field(default_factory=dict)

    def forget(self) -> None:
        """The next forward belongs to another run."""
        self.share.forget()
        self.forwards.end_run()
        for impl in self.impls.values():
            impl.end_run()

    def end(self) -> None:
        """The run ended: the next forward is step 0 of another one."""
        self.clock.reset()
        self.metadata.clear()
        self.forget()


class Runs:
    """A Run for each runner: a pipeline's scheduler, a thread. What nobody names as a runner shares one.

    A runner that is gone takes its run with it.
    """

    def __init__(self, clock: StepClock) -> None:
        self._unnamed = Run(clock)
        self._named = WeakIdKeyDictionary()

    def of(self, runner: object | None) -> Run:
        """The run of `runner`, new where it is met for the first time."""
        if runner is None:
            return self._unnamed
        if runner not in self._named:
            self._named[runner] = Run(self._unnamed.clock.another())
        run: Run = self._named[runner]
        return run

    def __iter__(self) -> Iterator[Run]:
        yield self._unnamed
        yield from list(self._named.values())
