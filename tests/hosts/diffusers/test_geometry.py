"""Which sizes a pipeline makes as asked: our rule against what real pipelines do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="drives diffusers")

from ditattn.errors import ConfigError
from ditattn.hosts.diffusers.geometry import check_geometry, frames_to_ask, size_multiples


def part(class_name: str, **config: Any) -> Any:
    return type(class_name, (), {"config": SimpleNamespace(**config)})()


def image_processor(factor: int) -> Any:
    return SimpleNamespace(config=SimpleNamespace(vae_scale_factor=factor))


# the attributes that the published models give their pipelines
PIPELINES = {
    "Wan 2.1": (
        SimpleNamespace(
            vae_scale_factor_spatial=8, vae_scale_factor_temporal=4, transformer=part("WanTransformer3DModel", patch_size=(1, 2, 2))
        ),
        (16, 16),
    ),
    "Wan 2.2 TI2V": (
        SimpleNamespace(
            vae_scale_factor_spatial=16, vae_scale_factor_temporal=4, transformer=part("WanTransformer3DModel", patch_size=(1, 2, 2))
        ),
        (32, 32),
    ),
    "Wan 2.2 with its second transformer alone": (
        SimpleNamespace(
            vae_scale_factor_spatial=8,
            vae_scale_factor_temporal=4,
            transformer=None,
            transformer_2=part("WanTransformer3DModel", patch_size=(1, 2, 2)),
        ),
        (16, 16),
    ),
    "HunyuanVideo": (
        SimpleNamespace(
            vae_scale_factor_spatial=8,
            vae_scale_factor_temporal=4,
            transformer=part("HunyuanVideoTransformer3DModel", patch_size=2, patch_size_t=1),
        ),
        (16, 16),
    ),
    "LTX-Video": (
        SimpleNamespace(
            vae_spatial_compression_ratio=32,
            vae_temporal_compression_ratio=8,
            transformer=part("LTXVideoTransformer3DModel", patch_size=1, patch_size_t=1),
        ),
        (32, 32),
    ),
    "CogVideoX": (
        SimpleNamespace(
            vae_scale_factor_spatial=8,
            vae_scale_factor_temporal=4,
            transformer=part("CogVideoXTransformer3DModel", patch_size=2, patch_size_t=None),
        ),
        (16, 16),
    ),
    "Flux": (
        SimpleNamespace(vae_scale_factor=8, image_processor=image_processor(16), transformer=part("FluxTransformer2DModel", patch_size=1)),
        (16, 16),
    ),
    "Qwen-Image": (
        SimpleNamespace(
            vae_scale_factor=8, image_processor=image_processor(16), transformer=part("QwenImageTransformer2DModel", patch_size=2)
        ),
        (16, 16),
    ),
    "a pipeline that says nothing": (SimpleNamespace(transformer=part("SomeTransformer")), (1, 1)),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_multiples(name):
    pipe, expected = PIPELINES[name]
    assert size_multiples(pipe) == expected


def test_sizes_off_the_grid_are_refused_and_the_neighbours_named():
    pipe = PIPELINES["Wan 2.1"][0]
    check_geometry(pipe, {"height": 480, "width": 832})
    check_geometry(pipe, {})
    with pytest.raises(ConfigError, match="width must be a multiple of 16, not 830; nearest: 816 or 832"):
        check_geometry(pipe, {"height": 480, "width": 830})


def test_frame_counts():
    wan = PIPELINES["Wan 2.1"][0]
    assert [frames_to_ask(wan, count) for count in (1, 5, 81)] == [1, 5, 81]
    with pytest.raises(ConfigError, match="not 80; nearest: 77 or 81"):
        frames_to_ask(wan, 80)
    with pytest.raises(ConfigError, match="multiple of 8 plus 1, not 100; nearest: 97 or 105"):
        frames_to_ask(PIPELINES["LTX-Video"][0], 100)
    assert frames_to_ask(PIPELINES["a pipeline that says nothing"][0], 100) == 100


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_a_vae_that_does_not_compress_time_still_makes_what_was_asked(num_frames, tmp_path):
    import torch

    from ditattn.hosts.diffusers.call import call_pipeline
    from ditattn.hosts.diffusers.demo_model import RANDOM_MODEL, build_random_model
    from ditattn.hosts.diffusers.load import load_pipeline

    build_random_model(tmp_path, {**RANDOM_MODEL, "transformer": {**RANDOM_MODEL["transformer"], "num_layers": 1}})
    pipe = load_pipeline(str(tmp_path), dtype=torch.float32, device="cpu")
    arguments = {"prompt": "a", "height": 16, "width": 32, "num_frames": num_frames, "num_inference_steps": 1}
    frames, times = call_pipeline(pipe, arguments, seed=0)
    assert frames.shape == (num_frames, 16, 32, 3)
    assert len(times.steps) == 1
