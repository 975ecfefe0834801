"""What stands around an installation: other installations, hooks, offloading and caches, models and changes that it cannot serve."""

from __future__ import annotations

import logging
from typing import Any

import diffusers
import pytest
import torch
from packaging import version
from torch import nn

import ditattn
import tiny_pipelines
from ditattn.errors import ConfigError, UnsupportedModel
from tiny_pipelines import FAMILIES, TinyPipeline, few_tokens
from tiny_pipelines.footprint import footprint
from tiny_pipelines.wan import transformer
from wan_runs import CALLS_PER_STEP, SPARSE, ran

pytestmark = pytest.mark.usefixtures("one_thread")


# several installations, and neighbours


def test_two_installations_do_not_know_each_other() -> None:
    one, other = (few_tokens(FAMILIES[name](), name) for name in ("wan", "flux"))
    natives = one.run(3), other.run(3)
    with ditattn.install(one.pipe, "rain_fusion_attn", **SPARSE) as first:
        with ditattn.install(other.pipe, "block_sparse_attn", **SPARSE) as second:
            one.run(3)
            other.run(3)
        assert torch.equal(other.run(3), natives[1])
        one.run(1)
    assert torch.equal(one.run(3), natives[0])
    counts = [handle.report().components["transformer"] for handle in (first, second)]
    assert [(count.backend, count.sparse) for count in counts] == [("rain_fusion_attn", 16), ("block_sparse_attn", 12)]


def test_a_second_installation_on_the_same_pipeline_is_refused_and_the_first_goes_on(wan: TinyPipeline) -> None:
    with ditattn.install(wan.pipe, "rain_fusion_attn", **SPARSE) as handle:
        installed = footprint(wan.pipe)
        with pytest.raises(UnsupportedModel, match=r"remove\(\) that one first"):
            ditattn.install(wan.pipe, "block_sparse_attn")
        assert footprint(wan.pipe) == installed
        wan.run(1)
    assert handle.report().components["transformer"].sparse == CALLS_PER_STEP


def test_a_refused_second_component_leaves_the_first_as_it_was() -> None:
    tiny = tiny_pipelines.wan_two_transformers()
    with ditattn.install(tiny.pipe.transformer_2, "torch_sdpa"):
        before = footprint(tiny.pipe)
        with pytest.raises(UnsupportedModel, match="transformer_2 is served"):
            ditattn.install(tiny.pipe, "rain_fusion_attn")
        assert footprint(tiny.pipe) == before


def test_removing_twice_does_nothing(wan: TinyPipeline) -> None:
    before = footprint(wan.pipe)
    handle = ditattn.install(wan.pipe, "rain_fusion_attn")
    handle.remove()
    handle.remove()
    assert footprint(wan.pipe) == before


def test_a_removed_handle_opens_no_block(wan: TinyPipeline) -> None:
    """What runs in the block would be torch's own."""
    with ditattn.install(wan.pipe, "torch_sdpa") as handle:
        pass
    with pytest.raises(ConfigError, match=r"installation was removed.* call install again"), handle:
        pass
    with ditattn.quantize(wan.pipe, "mxfp4") as quantized:
        pass
    with pytest.raises(ConfigError, match=r"quantisation was removed.* call quantize again"), quantized:
        pass
    with ditattn.register() as registration:
        pass
    with pytest.raises(ConfigError, match=r"registration was removed.* call register again"), registration:
        pass


def test_cross_attention_that_shares_a_processor_stays_native() -> None:
    tiny = few_tokens(tiny_pipelines.wan(), "wan")
    processor = tiny.pipe.transformer.blocks[0].attn1.processor
    tiny.pipe.transformer.set_attn_processor(processor)
    before = footprint(tiny.pipe)
    report = ran(tiny, **SPARSE)
    assert (report.calls, report.sparse) == (12, 12)
    assert footprint(tiny.pipe) == before


@pytest.mark.parametrize("later", ["hook", "accelerate"])
def test_what_was_wrapped_around_the_denoiser_later_survives_the_removal(later: str) -> None:
    tiny = few_tokens(tiny_pipelines.wan(), "wan")
    native = tiny.run(2)
    handle = ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE)
    denoiser, seen = tiny.pipe.transformer, []
    _wrap(denoiser, later, seen)
    tiny.run(2)
    assert handle.report().components["transformer"].sparse == 2 * CALLS_PER_STEP
    handle.remove()
    seen.clear()
    assert torch.equal(tiny.run(2), native)
    assert len(seen) == 4
    assert handle.report().components["transformer"].calls == 2 * CALLS_PER_STEP
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE) as again:
        tiny.run(2)
    assert again.report().components["transformer"].sparse == 2 * CALLS_PER_STEP
    assert torch.equal(tiny.run(2), native)


def test_offloading_that_renews_its_wrapper_after_every_run_keeps_us(wan: TinyPipeline) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    denoiser = wan.pipe.transformer
    add_hook_to_module(denoiser, AlignDevicesHook(execution_device="cpu"))
    with ditattn.install(wan.pipe, "rain_fusion_attn", **SPARSE) as handle:
        wan.run(1)
        # what enable_model_cpu_offload() does at the end of a pipeline call
        remove_hook_from_module(denoiser)
        add_hook_to_module(denoiser, AlignDevicesHook(execution_device="cpu"))
        wan.run(1)
    remove_hook_from_module(denoiser)
    vars(denoiser).pop("forward")
    assert handle.report().components["transformer"].sparse == 2 * CALLS_PER_STEP


def test_a_block_cache_leaves_steps_and_layers_right() -> None:
    from diffusers import FirstBlockCacheConfig

    tiny = tiny_pipelines.wan(transformer=transformer(num_layers=4))
    # the residual of these weights hardly changes: after the first step only block 0 runs
    tiny.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    cached, before = tiny.run(3), footprint(tiny.pipe)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", skip_layers="3", **SPARSE) as handle:
        tiny.run(3)
    report = handle.report().components["transformer"]
    assert footprint(tiny.pipe) == before
    assert torch.equal(tiny.run(3), cached)
    cells = handle._stage.models[0].log.cells
    assert {key: cell.sparse + cell.dense for key, cell in cells.items()} == {
        (0, 0): 2,
        (0, 1): 2,
        (0, 2): 2,
        (0, 3): 2,
        (1, 0): 2,
        (2, 0): 2,
    }
    assert report.dense_reasons == {"skipped layer": 2}


@pytest.mark.skipif(
    version.parse(diffusers.__version__) < version.parse("0.41"), reason="group offloading without an accelerator fails in this diffusers"
)
def test_blocks_that_are_offloaded_later_are_served() -> None:
    tiny = few_tokens(tiny_pipelines.wan(), "wan")
    native, cpu = tiny.run(2), torch.device("cpu")
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE) as handle:
        tiny.pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        tiny.run(2)
    assert handle.report().components["transformer"].sparse == 2 * CALLS_PER_STEP
    assert torch.equal(tiny.run(2), native)


def _wrap(denoiser: nn.Module, how: str, seen: list[int]) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from diffusers.hooks import HookRegistry, ModelHook

    class Counting(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(1)
            return args, kwargs

    class CountingOffload(AlignDevicesHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(1)
            return super().pre_forward(module, *args, **kwargs)

    if how == "hook":
        HookRegistry.check_if_exists_or_initialize(denoiser).register_hook(Counting(), "counting")
    else:
        add_hook_to_module(denoiser, CountingOffload(execution_device="cpu"))


# what cannot be served


class UnknownTransformer(nn.Module):
    """A denoiser of no family."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("inner", "_modules") else getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_an_unknown_family_is_served_by_rule_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tiny = few_tokens(tiny_pipelines.wan(), "wan")
    native = tiny.run(1)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE) as handle:
        known = tiny.run(1)
    density = handle.report().components["transformer"].sparse_density
    tiny.pipe.transformer = UnknownTransformer(tiny.pipe.transformer)
    with caplog.at_level(logging.WARNING, logger="ditattn"), ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE) as handle:
        assert torch.equal(tiny.run(1), known)
    report = handle.report()
    assert (report.components["transformer"].dense, report.components["transformer"].sparse_density) == (0, density)
    assert "UnknownTransformer, unlisted: by rule" in report.summary()
    assert "UnknownTransformer, unlisted: by rule" in caplog.text
    assert torch.equal(tiny.run(1), native)
    with pytest.raises(UnsupportedModel, match="UnknownTransformer"):
        ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True)


def test_processors_that_are_split_alone_are_refused() -> None:
    tiny = few_tokens(tiny_pipelines.wan(), "wan")
    tiny.pipe.transformer.blocks[0].attn1.processor._parallel_config = object()
    with pytest.raises(UnsupportedModel, match="set for context parallelism, it is not"):
        ditattn.install(tiny.pipe, "rain_fusion_attn")


@pytest.mark.parametrize("build", [tiny_pipelines.cogvideox, tiny_pipelines.wan], ids=["other processors", "another backend"])
def test_attention_that_is_taken_from_us_later_is_reported(build: Any) -> None:
    tiny = build()
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE) as handle:
        if build is tiny_pipelines.cogvideox:
            tiny.pipe.transformer.fuse_qkv_projections()
        else:
            for block in tiny.pipe.transformer.blocks:
                block.attn1.processor._attention_backend = None
        tiny.run(1)
    assert "replaced after the installation" in handle.report().summary()
