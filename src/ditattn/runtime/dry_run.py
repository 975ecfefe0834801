"""A forward whose attention calls are looked at and not served."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ditattn.backends.base import AttentionMetadata
from ditattn.plan.reuse import ForwardId
from ditattn.runtime.forward import Forward, Look, begin, end
from ditattn.runtime.run import Run
from ditattn.runtime.served_model import ServedModel
from ditattn.runtime.stage import DenoisingStage
from ditattn.runtime.step import Step, StepClock

__all__ = ["dry_run"]


@contextlib.contextmanager
def dry_run(model: ServedModel, look: Look) -> Iterator[None]:
    """Served attention calls of this thread are answered by `look`, which gets a forward that knows the layer, and query, key and value."""
    clock = StepClock()
    forward = Forward(DenoisingStage(clock), Run(clock), model, Step(None, None, "none"), ForwardId(), None, AttentionMetadata(), look=look)
    begin(forward)
    try:
        yield
    finally:
        end(forward)
