"""Arguments and times of a pipeline call."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("diffusers", reason="drives diffusers")

import numpy as np
import torch
from torch import nn

from ditattn.errors import ConfigError
from ditattn.hosts.diffusers import call
from ditattn.hosts.diffusers.call import call_defaults, call_pipeline, check_arguments, frame_rate, makes_video


class Denoiser(nn.Module):
    def forward(self, x):
        return x


class Pipeline:
    """As much of a pipeline as a call needs."""

    device = torch.device("cpu")
    config = SimpleNamespace()

    def __init__(self):
        self.transformer = Denoiser()

    @property
    def components(self):
        return {"transformer": self.transformer}

    def __call__(self, prompt, num_steps=3, generator=None, output_type="pil", callback_on_step_end=None):
        assert output_type == "np"
        noise = torch.rand(2, 4, 6, 3, generator=generator)
        for step in range(num_steps):
            self.transformer(noise)
            callback_on_step_end(self, step, step, {})
        return SimpleNamespace(frames=[noise.numpy()])


class Silent(Pipeline):
    """A pipeline that does not say when a step ends, and makes one image."""

    def __call__(self, image, prompt=None):
        self.transformer(torch.zeros(1))
        return SimpleNamespace(images=[np.full((4, 6, 3), 2.0)])


def test_steps_and_stages_add_up():
    frames, times = call_pipeline(Pipeline(), {"prompt": "a", "num_steps": 5}, seed=0)
    assert (frames.shape, frames.dtype) == ((2, 4, 6, 3), np.uint8)
    assert len(times.steps) == 5
    assert list(times.stages) == ["encode", "denoise", "decode"]
    assert times.stages["denoise"] == pytest.approx(sum(times.steps))
    assert times.memory == {}


def test_the_seed_is_that_of_a_generator_on_the_cpu():
    frames, _ = call_pipeline(Pipeline(), {"prompt": "a"}, seed=3)
    expected = torch.rand(2, 4, 6, 3, generator=torch.Generator("cpu").manual_seed(3))
    assert np.array_equal(frames, (expected.numpy() * 255).round().astype(np.uint8))


def test_a_pipeline_without_a_step_callback():
    pipe = Silent()
    frames, times = call_pipeline(pipe, {"image": None}, seed=0)
    # values beyond 1 are clipped, not wrapped
    assert frames.shape == (1, 4, 6, 3)
    assert (frames == 255).all()
    assert list(times.stages) == ["encode", "generate"]
    assert not pipe.transformer._forward_pre_hooks


def test_hooks_go_when_the_call_fails():
    pipe = Pipeline()
    with pytest.raises(TypeError):
        call_pipeline(pipe, {"prompt": "a", "no_such": 1}, seed=0)
    assert not pipe.transformer._forward_pre_hooks


def test_devices_with_memory_are_asked_at_the_end_of_every_stage(monkeypatch):
    waits = []
    sizes = {"memory_allocated": 1, "memory_reserved": 2, "max_memory_allocated": 3, "max_memory_reserved": 4}
    functions = {name: (lambda size=size: size * 2**20) for name, size in sizes.items()}
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(synchronize=lambda: waits.append(1), **functions))
    watch = call._Watch(torch.device("cuda"), call.no_step)
    watch.on_forward(None, None)
    watch.on_step_end(None, 0, 0, {})
    times = watch.finish()
    expected = {"allocated_mb": 1.0, "reserved_mb": 2.0, "peak_allocated_mb": 3.0, "peak_reserved_mb": 4.0}
    assert times.memory == dict.fromkeys(("encode", "denoise", "decode"), expected)
    # every mark waits for the device, or times would be those of launching
    assert len(waits) == 4


def test_arguments_are_checked_against_the_signature():
    check_arguments(Pipeline, {"prompt": "a"})
    with pytest.raises(ConfigError, match="--size cannot be honoured: Pipeline takes no 'size'"):
        check_arguments(Pipeline, {"prompt": "a", "size": 3}, lambda name: f"--{name}")
    with pytest.raises(ConfigError, match="Silent needs 'image': --image-path"):
        check_arguments(Silent, {"prompt": "a"}, lambda name: "--image-path")
    assert call_defaults(Pipeline)["num_steps"] == 3
    assert "prompt" not in call_defaults(Pipeline)


def test_frame_rates():
    import diffusers

    def pipe(cls, transformer, **config):
        """The class's signature and configuration, around one denoiser of that class name."""
        part = type(transformer, (nn.Module,), {})()
        facts = {"components": {"transformer": part}, "config": SimpleNamespace(**config), "__call__": cls.__call__}
        return type(cls.__name__, (), facts)()

    assert frame_rate(pipe(diffusers.WanPipeline, "WanTransformer3DModel")) == 16
    assert frame_rate(pipe(diffusers.WanPipeline, "WanTransformer3DModel", expand_timesteps=True)) == 24
    assert frame_rate(pipe(diffusers.LTXPipeline, "LTXVideoTransformer3DModel")) == 25
    assert frame_rate(pipe(diffusers.CogVideoXPipeline, "CogVideoXTransformer3DModel")) == 8
    assert frame_rate(pipe(diffusers.HunyuanVideoPipeline, "HunyuanVideoTransformer3DModel")) == 24
    assert makes_video(diffusers.WanPipeline)
    assert not makes_video(diffusers.FluxPipeline)
