"""Runs of a denoising loop, which vllm-omni does not announce: where one begins, and what its layers did."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

from ditattn.backends.base import CallRecord
from ditattn.backends.config import SparseAttentionConfig
from ditattn.hosts.vllm_omni.environment import SLOT
from ditattn.runtime.report import ComponentLog
from ditattn.runtime.run_share import RunShare
from ditattn.runtime.step import Step

if TYPE_CHECKING:
    from ditattn.hosts.vllm_omni.layer import Layer

__all__ = ["Run", "logger", "run_of_process"]

# below vllm_omni's root, so that vLLM's handlers print its lines
logger = logging.getLogger("vllm_omni.plugins.ditattn")


class Run:
    """What the layers of this process do, from one run of a model's denoising loop to the next: counted, and logged when a run ends."""

    def __init__(self) -> None:
        self.number = 0
        self._share = RunShare()
        self._log: ComponentLog | None = None
        self._configs: dict[SparseAttentionConfig, str] = {}
        self._first_step: int | None = None
        self._last_step: int | None = None

    def enter(self, step: Step) -> None:
        """A call of this step begins. A run has begun where the step goes back to the first one or before it."""
        if step.index is None:
            return
        if self._first_step is not None and self._last_step is not None and step.index <= self._first_step and step.index < self._last_step:
            self.finish()
        self._first_step = step.index if self._first_step is None else self._first_step
        self._last_step = step.index

    def add(self, layer: Layer, step: Step, record: CallRecord) -> None:
        """Count a call."""
        log = self.log_of(layer)
        if step.index is not None and step.index not in log.steps:
            log.note_step(step.index, step.num_steps, step.source)
        log.add(step.index, layer.number, record)
        self._share.add(record)

    def log_of(self, layer: Layer) -> ComponentLog:
        """Of all layers; a run has one backend."""
        if self._log is None:
            self._log = ComponentLog(SLOT, layer.backend.name, layer.config.model_dump())
        self._configs[layer.config] = layer.backend.name
        return self._log

    def finish(self) -> None:
        """The run ended: log what ran, and forget it."""
        if self._log is not None:
            logger.info("ditattn: %s", self._log.report().sentence())
            self._share.warn((name, config) for config, name in self._configs.items())
        self.number += 1
        self._share.forget()
        self._log, self._first_step, self._last_step = None, None, None
        self._configs.clear()


@cache
def run_of_process() -> Run:
    """The one that all layers of this process share."""
    return Run()
