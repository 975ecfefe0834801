"""Qwen-Image 2.1: the first step fills a cache by itself; from then on queries are the image's, keys also those of the cache."""

from __future__ import annotations

from functools import cache

import diffusers
import pytest
import torch
from packaging import version
from torch import Tensor

import ditattn
from tiny_pipelines import TinyPipeline, packed_images
from tiny_pipelines.footprint import footprint

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(version.parse(diffusers.__version__) < version.parse("0.42"), reason="an older diffusers does not have it"),
]

BACKENDS = ("rain_fusion_attn", "block_sparse_attn", "permuted_sparse_attn")
STEPS = 4


@cache
def built() -> tuple[TinyPipeline, Tensor]:
    tiny = packed_images.qwen_image21()
    return tiny, tiny.run(STEPS)


@pytest.mark.shows("backend")
@pytest.mark.parametrize("backend", ["torch_sdpa", "fa", "laser_attn"])
def test_a_dense_backend_is_native(backend: str) -> None:
    tiny, native = built()
    with ditattn.install(tiny.pipe, backend) as handle:
        torch.testing.assert_close(tiny.run(STEPS), native, rtol=0, atol=1e-4)
    assert handle.report().components["transformer"].calls == 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparsity_zero_is_native(backend: str) -> None:
    tiny, native = built()
    with ditattn.install(tiny.pipe, backend, sparsity=0) as handle:
        assert torch.equal(tiny.run(STEPS), native)
    # three steps, two layers
    assert handle.report().components["transformer"].dense_reasons == {"sparsity 0": 6}


@pytest.mark.parametrize("backend", BACKENDS)
def test_keeping_every_block_is_native(backend: str) -> None:
    tiny, native = built()
    with ditattn.install(tiny.pipe, backend, strict=True, sparsity=1e-4, skip_first_steps=0, min_tokens=0) as handle:
        torch.testing.assert_close(tiny.run(STEPS), native, rtol=0, atol=1e-4)
    report = handle.report().components["transformer"]
    assert (report.sparse, report.dense, report.sparse_density) == (6, 0, 1.0)


@pytest.mark.shows("backend")
@pytest.mark.shows("references")
@pytest.mark.parametrize("backend", BACKENDS)
def test_lower_density_runs_in_the_right_steps_and_layers_and_leaves_no_trace(backend: str) -> None:
    tiny, native = built()
    before = footprint(tiny.pipe)
    with ditattn.install(tiny.pipe, backend, sparsity=0.6, skip_first_steps=2, min_tokens=0) as handle:
        assert (tiny.run(STEPS) - native).abs().max() > 1e-3
    report = handle.report().components["transformer"]
    assert report.dense_reasons == {"first steps": 2}
    assert {step for step, density in report.sparse_density_by_step.items() if density is not None} == {2, 3}
    assert list(report.sparse_density_by_layer) == [0, 1]
    assert 0.3 < report.sparse_density < 0.85
    assert footprint(tiny.pipe) == before
    assert torch.equal(tiny.run(STEPS), native)


def test_without_the_cache_every_step_is_diffusers_own() -> None:
    tiny = packed_images.qwen_image21(use_cache=False)
    native = tiny.run(2)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", sparsity=0.6, skip_first_steps=0, min_tokens=0) as handle:
        assert torch.equal(tiny.run(2), native)
    assert handle.report().components["transformer"].calls == 0


@pytest.mark.shows("register")
def test_a_registered_name_runs_what_install_runs() -> None:
    tiny, native = built()
    settings = {"sparsity": 0.6, "skip_first_steps": 2, "min_tokens": 0}
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **settings):
        expected = tiny.run(STEPS)
    with ditattn.register(**settings) as registration:
        tiny.pipe.transformer.set_attention_backend("rain_fusion_attn")
        out = tiny.run(STEPS)
        report = registration.report().components["QwenImage21Transformer2DModel"]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    assert not torch.equal(out, native)
    assert report.sparse == 4
