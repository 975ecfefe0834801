"""One call of a pipeline: its arguments, and how long each part took."""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ditattn.errors import ConfigError
from ditattn.hosts.diffusers.geometry import check_geometry, frames_to_ask
from ditattn.hosts.diffusers.install import denoisers
from ditattn.models import DEFAULT_FRAME_RATE, family_of, find_family, unwrapped

__all__ = ["CallTimes", "OnStep", "call_defaults", "call_pipeline", "check_arguments", "frame_rate", "makes_video", "no_step"]

OnStep = Callable[[int, int | None], None]


def no_step(done: int, total: int | None) -> None:
    """Nobody wants to know."""


def _parameters(pipeline_cls: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(pipeline_cls, "__call__")).parameters  # noqa: B004, B009


def makes_video(pipeline_cls: type) -> bool:
    """True if the pipeline's result is frames, False if it is an image."""
    return "num_frames" in _parameters(pipeline_cls)


def call_defaults(pipeline_cls: type) -> dict[str, Any]:
    """What the pipeline takes where nothing is given; None where it decides while running."""
    return {name: p.default for name, p in _parameters(pipeline_cls).items() if p.default is not inspect.Parameter.empty}


def frame_rate(pipe: Any) -> int:
    """Frames per second that the model's videos are meant to be played at."""
    if "frame_rate" in _parameters(type(pipe)):
        return int(call_defaults(type(pipe))["frame_rate"])
    for module in denoisers(pipe).values():
        if family := find_family(type(unwrapped(module)).__name__):
            return family.frame_rate(pipe.config)
    return DEFAULT_FRAME_RATE


def check_arguments(pipeline_cls: type, given: Mapping[str, Any], called: Callable[[str], str] = str) -> None:
    """Before anything is loaded: does the pipeline take these arguments, and is none missing that it needs?

    Args:
        pipeline_cls: the pipeline's class.
        given: arguments by name.
        called: how errors call an argument, such as its command-line option.

    Raises:
        ConfigError: an argument that the pipeline does not take, or a missing one.
    """
    parameters = _parameters(pipeline_cls)
    for name in given:
        if name not in parameters:
            raise ConfigError(f"{called(name)} cannot be honoured: {pipeline_cls.__name__} takes no '{name}'")
    for name, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if required and name not in ("self", *given):
            raise ConfigError(f"{pipeline_cls.__name__} needs '{name}': {called(name)}")


@dataclass
class CallTimes:
    """Times of one call, milliseconds.

    Attributes:
        stages: encode, denoise, decode; or one "generate" where the pipeline does not say when a step ends.
        steps: each denoising step.
        memory: device memory at the end of each stage, MiB; empty on devices that do not tell.
    """

    stages: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    memory: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def total_ms(self) -> float:
        return sum(self.stages.values())


class _Watch:
    """Marks: the call begins, the first denoiser forward begins, a step ends, the call ends."""

    def __init__(self, device: torch.device, on_step: OnStep) -> None:
        self._on_step = on_step
        self._device_module = None if device.type == "cpu" else getattr(torch, device.type, None)
        self.times = CallTimes()
        self._last_s = self._now()
        self._denoising = False

    def _now(self) -> float:
        if self._device_module is not None and hasattr(self._device_module, "synchronize"):
            self._device_module.synchronize()
        return time.perf_counter()

    def _lap_ms(self) -> float:
        before, self._last_s = self._last_s, self._now()
        return (self._last_s - before) * 1e3

    def _end_stage(self, name: str, duration_ms: float) -> None:
        self.times.stages[name] = duration_ms
        module = self._device_module
        if module is not None and hasattr(module, "memory_allocated"):
            self.times.memory[name] = {
                "allocated_mb": module.memory_allocated() / 2**20,
                "reserved_mb": module.memory_reserved() / 2**20,
                "peak_allocated_mb": module.max_memory_allocated() / 2**20,
                "peak_reserved_mb": module.max_memory_reserved() / 2**20,
            }

    def on_forward(self, _module: Any, _args: Any) -> None:
        if not self._denoising:
            self._denoising = True
            self._end_stage("encode", self._lap_ms())

    def on_step_end(self, pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.times.steps.append(self._lap_ms())
        self._on_step(len(self.times.steps), getattr(pipe, "num_timesteps", None))
        return tensors

    def finish(self) -> CallTimes:
        if self.times.steps:
            self._end_stage("denoise", sum(self.times.steps))
            self._end_stage("decode", self._lap_ms())
        else:
            self._end_stage("generate", self._lap_ms())
        return self.times


def call_pipeline(
    pipe: Any, arguments: Mapping[str, Any], *, seed: int, on_step: OnStep = no_step
) -> tuple[np.ndarray[Any, Any], CallTimes]:
    """Run a pipeline once.

    Args:
        pipe: a loaded pipeline.
        arguments: of its call, by name; `num_frames` is what is wanted, not what the pipeline's rounding must be told.
        seed: of a generator on the CPU, so that runs on different devices start from the same noise.
        on_step: called after each step, where the pipeline says when one ends, with the steps that are done and how many there are (None
            if the pipeline does not say).

    Returns:
        frames `[F, H, W, 3]`, uint8 (an image is one frame), and the times.

    Raises:
        ConfigError: a size that the pipeline would round or refuse, or not-a-number pixels.
    """
    check_geometry(pipe, arguments)
    arguments = dict(arguments)
    if "num_frames" in arguments:
        arguments["num_frames"] = frames_to_ask(pipe, arguments["num_frames"])
    parameters = _parameters(type(pipe))
    watch = _Watch(torch.device(pipe.device), on_step)
    extras = {"generator": torch.Generator("cpu").manual_seed(seed), "output_type": "np", "callback_on_step_end": watch.on_step_end}
    arguments |= {name: value for name, value in extras.items() if name in parameters}
    hooks = [module.register_forward_pre_hook(watch.on_forward) for module in denoisers(pipe).values()]
    try:
        with _without_untrue_notices(pipe):
            result = pipe(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    times = watch.finish()
    return _pixels(result), times


@contextlib.contextmanager
def _without_untrue_notices(pipe: Any) -> Iterator[None]:
    """Drop what the pipeline of a family logs although it is not so."""
    families = filter(None, map(family_of, denoisers(pipe).values()))
    with contextlib.ExitStack() as undo:
        for name, text in {item for family in families for item in family.untrue_notices.items()}:
            logger, keep = logging.getLogger(name), _LacksText(text)
            logger.addFilter(keep)
            undo.callback(logger.removeFilter, keep)
        yield


class _LacksText(logging.Filter):
    """Keeps records that do not hold the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self._text not in record.getMessage()


def _pixels(result: Any) -> np.ndarray[Any, Any]:
    first = (result.frames if hasattr(result, "frames") else result.images)[0]
    pixels = np.stack([np.asarray(frame) for frame in first]) if isinstance(first, (list, tuple)) else np.asarray(first)
    if pixels.dtype != np.uint8:
        if not np.isfinite(pixels).all():
            raise ConfigError("the model made pixels that are not numbers: the dtype is too narrow for it, try --dtype float32")
        pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    return pixels[None] if pixels.ndim == 3 else pixels
