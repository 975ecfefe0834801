"""Step caches by name: switched on for every denoiser, refused with the reason, and gone when they are switched off."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch

import ditattn
import tiny_pipelines
from ditattn.backends.config import BlockSparseAttentionConfig
from ditattn.backends.setting import Setting
from ditattn.compare.setting import Clip
from ditattn.errors import ConfigError, UnknownKey, UnsupportedModel
from ditattn.hosts.diffusers.step_cache import STEP_CACHES, add_step_cache, check_pipeline, parse_step_cache
from ditattn.hosts.diffusers.workload import PipelineWorkload
from tiny_pipelines import few_tokens
from tiny_pipelines.footprint import footprint
from tiny_pipelines.latent_images import stable_diffusion_3
from tiny_pipelines.wan import transformer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_denoiser_gets_it_and_loses_it_again() -> None:
    tiny = few_tokens(tiny_pipelines.wan_two_transformers(), "wan")
    plain = tiny.run(3)
    off = add_step_cache(tiny.pipe, parse_step_cache("first_block", {"threshold": 10.0}), 3)
    assert tiny.pipe.transformer.is_cache_enabled
    assert tiny.pipe.transformer_2.is_cache_enabled
    assert not torch.equal(tiny.run(3), plain)
    off()
    assert not tiny.pipe.transformer.is_cache_enabled
    assert torch.equal(tiny.run(3), plain)


def test_what_a_pipeline_knows_is_filled_in() -> None:
    tiny = few_tokens(tiny_pipelines.wan(), "wan")
    keys = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": [0, 1001]}
    add_step_cache(tiny.pipe, parse_step_cache("pyramid_attention_broadcast", keys), 3)
    assert tiny.pipe.transformer._cache_config.spatial_attention_timestep_skip_range == (0, 1001)
    tiny.run(2)
    tiny = few_tokens(tiny_pipelines.wan(), "wan")
    add_step_cache(tiny.pipe, parse_step_cache("mag", {"mag_ratios": [1.0, 1.0, 1.0]}), 3)
    assert tiny.pipe.transformer._cache_config.num_inference_steps == 3


def test_a_cache_that_is_refused_leaves_nothing() -> None:
    tiny = tiny_pipelines.wan(transformer=transformer(num_layers=1))
    before = footprint(tiny.pipe)
    with pytest.raises(UnsupportedModel, match=r"first_block needs two or more transformer blocks, and WanPipeline\.transformer has fewer"):
        add_step_cache(tiny.pipe, parse_step_cache("first_block", {}), None)
    assert footprint(tiny.pipe) == before


def test_what_a_model_or_its_pipeline_lacks_is_said() -> None:
    sd3 = stable_diffusion_3().pipe
    with pytest.raises(UnsupportedModel, match="StableDiffusion3Pipeline does not say which one runs"):
        add_step_cache(sd3, parse_step_cache("first_block", {}), None)
    with pytest.raises(UnsupportedModel, match="SD3Transformer2DModel, which diffusers gives no step caches"):
        add_step_cache(sd3, parse_step_cache("mag", {"calibrate": True}), 3)
    asks = parse_step_cache("pyramid_attention_broadcast", {"spatial_attention_block_skip_range": 2})
    with pytest.raises(UnsupportedModel, match="does not say"):
        check_pipeline(diffusers.StableDiffusion3Pipeline, asks)


def test_names_and_keys_are_checked() -> None:
    with pytest.raises(ConfigError, match="no step cache 'tea'; there is first_block"):
        parse_step_cache("tea", {})
    with pytest.raises(UnknownKey, match="unknown key 'current_timestep_callback'"):
        parse_step_cache("faster", {"current_timestep_callback": 1})
    there = [name for name, cls in STEP_CACHES.items() if hasattr(diffusers, cls)]
    asked = {"mag": {"calibrate": True}}
    assert all(parse_step_cache(name, asked.get(name, {})).name == name for name in there)
    with pytest.raises(ConfigError, match="mag needs mag_ratios, which depend on model and steps: a run with calibrate=true prints them"):
        parse_step_cache("mag", {"calibrate": False})
    assert parse_step_cache("first_block", {"threshold": "0.1"}).keys == {"threshold": 0.1}
    assert parse_step_cache("faster", {"spatial_attention_timestep_skip_range": [1, 9]}).keys == {
        "spatial_attention_timestep_skip_range": (1, 9)
    }


@pytest.mark.skipif(not hasattr(diffusers, "SeaCacheConfig"), reason="before diffusers 0.41 there is no SeaCache")
@pytest.mark.parametrize("cache_first", [True, False], ids=["cache first", "install first"])
def test_sea_beside_install(cache_first: bool) -> None:
    """test_step_caches.py has the others; this one serves fewer models."""
    tiny, cache = (
        tiny_pipelines.wan(transformer=transformer(num_layers=4)),
        parse_step_cache("sea", {"threshold": 100.0, "cache_end_steps": 0}),
    )
    plain = tiny.run(4)
    off = add_step_cache(tiny.pipe, cache, 4)
    alone = tiny.run(4)
    off()
    assert not torch.equal(alone, plain)
    for backend, keys in (("torch_sdpa", {}), ("rain_fusion_attn", {"sparsity": 0.5, "skip_first_steps": 1, "min_tokens": 0})):
        with contextlib.ExitStack() as undo:
            turns = [
                lambda: undo.callback(add_step_cache(tiny.pipe, cache, 4)),
                lambda backend=backend, keys=keys: undo.enter_context(ditattn.install(tiny.pipe, backend, **keys)),
            ]
            on = [turn() for turn in (turns if cache_first else reversed(turns))]
            made = tiny.run(4)
            handle = on[1 if cache_first else 0]
            report = handle.report().components["transformer"]
        calls_of_each_step = 2 * 4
        assert calls_of_each_step < report.calls < 4 * calls_of_each_step
        assert torch.equal(made, alone) is (backend == "torch_sdpa")
        assert report.dense == (report.calls if backend == "torch_sdpa" else calls_of_each_step)
        assert torch.equal(tiny.run(4), plain)


TUNED: dict[str, Any] = {"sparsity": 0.5, "min_tokens": 0, "step_cache": {"name": "first_block", "keys": {"threshold": 0.1}}}


def test_keys_that_were_tuned_beside_a_cache_warn_where_none_is_on(caplog: pytest.LogCaptureFixture) -> None:
    tiny = few_tokens(tiny_pipelines.wan_two_transformers(), "wan")
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **TUNED):
        tiny.run(2)
    (message,) = [one.getMessage() for one in caplog.records if "step cache" in one.getMessage()]
    assert message.startswith(
        "transformer, transformer_2: the keys were tuned beside the step cache first_block threshold=0.1, and none is on"
    )
    caplog.clear()
    off = add_step_cache(tiny.pipe, parse_step_cache("first_block", {"threshold": 0.1}), 2)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **TUNED):
        tiny.run(2)
    off()
    assert not caplog.records


@pytest.mark.parametrize(
    "wrong", [None, "first_block", {}, {"name": 1}, {"name": "mag", "keys": [1]}, {"name": "mag", "threshold": 1}], ids=str
)
def test_a_cache_that_no_tune_wrote_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="step_cache"):
        ditattn.install(tiny_pipelines.wan().pipe, "rain_fusion_attn", step_cache=wrong)


def test_who_cannot_switch_a_cache_on_says_so() -> None:
    """Every other reader of a configuration: a key of the host is none of the attention's."""
    for read in (BlockSparseAttentionConfig.from_mapping, lambda keys: Setting.parse("permuted_sparse_attn", keys)):
        with pytest.raises(UnknownKey, match=r"step_cache: these keys were tuned beside a step cache \(.*first_block.*\), which cannot be"):
            read(TUNED)
    with pytest.raises(UnknownKey, match="step_cache"):
        ditattn.register(**TUNED)


def test_a_probe_sees_the_calls_that_a_cache_lets_run() -> None:
    keys = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (0, 1001)}
    tiny = few_tokens(tiny_pipelines.wan(), "wan")
    workload = PipelineWorkload(tiny.pipe, lambda _: {**tiny.arguments, "num_inference_steps": 4, "guidance_scale": 1.0})
    setting = Setting.parse("rain_fusion_attn", {"sparsity": 0.5, "skip_first_steps": 0, "min_tokens": 0})
    cached = replace(setting, step_cache=parse_step_cache("pyramid_attention_broadcast", keys))
    every, some = (workload.probe([one], Clip("", 0))[0] for one in (setting, cached))
    assert {one.step for one in every} == {0, 1, 2, 3}
    assert {one.step for one in some} == {0, 2}
    assert not tiny.pipe.transformer.is_cache_enabled
    with pytest.raises(ConfigError, match="one step cache"):
        workload.probe([setting, cached], Clip("", 0))


@pytest.mark.parametrize(
    ("name", "keys", "text"),
    [
        ("first_block", {"threshold": "abc"}, r"first_block: threshold: Input should be a valid number.*\(got 'abc'\)"),
        ("pyramid_attention_broadcast", {"spatial_attention_timestep_skip_range": [1, 2, 3]}, "spatial_attention_timestep_skip_range"),
        ("taylorseer", {"cache_identifiers": 3}, "cache_identifiers: Input should be a valid list"),
        ("mag", {"calibrate": True, "max_skip_steps": "many"}, "max_skip_steps: Input should be a valid integer"),
    ],
)
def test_values_of_other_types_are_refused_before_anything_runs(name: str, keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse_step_cache(name, keys)
