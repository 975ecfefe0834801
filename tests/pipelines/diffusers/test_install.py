"""What install promises apart from the family: settings, errors, several installations, and what is around it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from packaging import version
from torch import nn

import ditattn
import tiny_pipelines
from ditattn.errors import (
    ConfigError,
    DenseInStrictMode,
    UnknownBackend,
    UnknownKey,
    UnsupportedCall,
    UnsupportedHeadSize,
    UnsupportedModel,
)
from ditattn.pipelines.denoising import running
from ditattn.pipelines.report import ComponentReport
from tiny_pipelines import TinyPipeline
from tiny_pipelines.footprint import footprint
from tiny_pipelines.wan import transformer

SPARSE = {"sparsity": 0.6, "skip_first_steps": 0, "min_tokens": 0}
# two CFG branches, two layers
CALLS_PER_STEP = 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def wan() -> TinyPipeline:
    return tiny_pipelines.wan()


def ran(tiny: TinyPipeline, num_steps: int = 3, backend: str = "rain_fusion_attn", **config: Any) -> ComponentReport:
    with ditattn.install(tiny.pipe, backend, **config) as handle:
        tiny.run(num_steps)
    return handle.report().components["transformer"]


def sparse_steps(report: ComponentReport) -> list[int]:
    return [step for step, density in report.density_by_step.items() if density is not None]


# settings


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"skip_first_steps": 2}, [2, 3, 4]),
        ({"skip_first_steps": "20%"}, [1, 2, 3, 4]),
        # a share is rounded up
        ({"skip_first_steps": "21%"}, [2, 3, 4]),
        ({"skip_last_steps": 2}, [0, 1, 2]),
        ({"skip_first_steps": 1, "skip_last_steps": "40%"}, [1, 2]),
    ],
)
def test_dense_steps(wan: TinyPipeline, config: dict[str, Any], expected: list[int]) -> None:
    report = ran(wan, 5, **{**SPARSE, **config})
    assert sparse_steps(report) == expected
    assert set(report.dense_reasons) == {f"{end} steps" for end in ("first", "last") if config.get(f"skip_{end}_steps")}
    assert report.sparse == len(expected) * CALLS_PER_STEP


def test_a_skipped_layer_is_dense_in_every_step(wan: TinyPipeline) -> None:
    report = ran(wan, skip_layers="1", **SPARSE)
    assert report.dense_reasons == {"skipped layer": 6}
    assert report.density_by_layer[0] is not None
    assert report.density_by_layer[1] is None


@pytest.mark.parametrize(("min_tokens", "sparse"), [(1400, 12), (1401, 0)])
def test_short_sequences_run_densely(wan: TinyPipeline, min_tokens: int, sparse: int) -> None:
    report = ran(wan, **{**SPARSE, "min_tokens": min_tokens})
    assert report.sparse == sparse
    assert report.dense_reasons == ({} if sparse else {"short sequence": 12})


@pytest.mark.parametrize("backend", ["rain_fusion_attn", "block_sparse_attn"])
def test_lower_density_is_further_from_native_but_not_far(wan: TinyPipeline, backend: str) -> None:
    native = wan.run(3)
    errors, densities = [], []
    for sparsity in (0.2, 0.5, 0.8):
        with ditattn.install(wan.pipe, backend, **{**SPARSE, "sparsity": sparsity}) as handle:
            errors.append(float((wan.run(3) - native).norm() / native.norm()))
        densities.append(handle.report().components["transformer"].density)
    assert densities == sorted(densities, reverse=True)
    assert errors == sorted(errors)
    assert errors[-1] < 0.1


def test_half_precision_at_sparsity_zero_is_as_exact_as_native() -> None:
    tiny = tiny_pipelines.wan()
    exact = tiny.run(2)
    tiny.pipe.transformer.to(torch.bfloat16)
    native = tiny.run(2)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", sparsity=0):
        out = tiny.run(2)
    # another exact kernel may serve here: what rounding makes of this model is then another number of the same size
    assert (out - exact).norm() <= 1.5 * (native - exact).norm()
    with ditattn.install(tiny.pipe, "torch_sdpa"):
        # the same kernel on the same numbers: nothing is rounded differently
        torch.testing.assert_close(tiny.run(2), native, rtol=0, atol=1e-5)


# dense backends and backends per component


@pytest.mark.parametrize("backend", ["torch_sdpa", "fa", "laser_attn"])
@pytest.mark.parametrize("build", [tiny_pipelines.wan, tiny_pipelines.cogvideox], ids=["wan", "cogvideox"])
def test_dense_backends_are_native(build: Any, backend: str) -> None:
    tiny = build()
    native = tiny.run(2)
    with ditattn.install(tiny.pipe, backend) as handle:
        out = tiny.run(2)
    report = handle.report().components["transformer"]
    # laser_attn is whatever exact kernel is fastest here, which may sum in another order; CogVideoX's guidance enlarges that
    torch.testing.assert_close(out, native, rtol=0, atol=1e-4 if backend == "laser_attn" else 1e-5)
    assert report.dense_reasons == {"dense backend": report.calls}
    assert report.calls > 0


def test_fa_refuses_a_mask_it_cannot_honour() -> None:
    tiny = tiny_pipelines.hunyuan_video()
    with ditattn.install(tiny.pipe, "fa"), pytest.raises(UnsupportedCall, match="key_lengths"):
        tiny.run(1)


def test_each_component_has_its_own_backend() -> None:
    tiny = tiny_pipelines.wan_two_transformers()
    with ditattn.install(tiny.pipe, "rain_fusion_attn", components={"transformer": "torch_sdpa"}, **SPARSE) as handle:
        tiny.run(4)
    first, second = handle.report().components["transformer"], handle.report().components["transformer_2"]
    assert (first.backend, second.backend) == ("torch_sdpa", "rain_fusion_attn")
    # one count for both: the second transformer goes on where the first one stopped
    assert sorted(first.density_by_step) + sorted(second.density_by_step) == [0, 1, 2, 3]
    assert (first.sparse, second.dense) == (0, 0)


def test_the_environment_names_a_backend_for_installations_that_name_none(wan: TinyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITATTN_ATTENTION_BACKEND", "block_sparse_attn")
    with ditattn.install(wan.pipe, **SPARSE) as handle:
        wan.run(1)
    assert handle.report().components["transformer"].backend == "block_sparse_attn"


# steps


def test_a_second_run_begins_at_step_zero(wan: TinyPipeline) -> None:
    with ditattn.install(wan.pipe, "rain_fusion_attn", **{**SPARSE, "skip_first_steps": 2}) as handle:
        wan.run(3)
        wan.run(3)
    report = handle.report().components["transformer"]
    assert report.dense_reasons == {"first steps": 2 * 2 * CALLS_PER_STEP}
    assert sorted(report.density_by_step) == [0, 1, 2]


@pytest.mark.parametrize("build", [tiny_pipelines.flux, tiny_pipelines.cogvideox], ids=["scheduler", "timestep"])
def test_a_run_after_an_interrupted_one_begins_at_step_zero(build: Any) -> None:
    tiny = build()

    def interrupt(_pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise KeyboardInterrupt
        return values

    with ditattn.install(tiny.pipe, "rain_fusion_attn", **{**SPARSE, "skip_first_steps": 2}) as handle:
        with pytest.raises(KeyboardInterrupt):
            tiny.run(4, callback_on_step_end=interrupt)
        before = handle.report().components["transformer"]
        tiny.run(3)
    after = handle.report().components["transformer"]
    assert before.sparse == 0
    assert after.sparse * 3 == after.calls - before.calls


def test_a_bare_transformer_counts_changes_of_the_timestep() -> None:
    denoiser = transformer().requires_grad_(False)
    with ditattn.install(denoiser, "rain_fusion_attn", **SPARSE) as handle:
        for timestep in (900, 900, 600, 300, 950, 500):
            _forward(denoiser, timestep)
    report = handle.report().components["WanTransformer3DModel"]
    assert report.step_sources == {"timestep": 6}
    assert {step: cell.sparse for (step, layer), cell in handle._stage.models[0].log.cells.items() if layer == 0} == {0: 3, 1: 2, 2: 1}


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_forward_that_raised_ends_the_run(error: type[BaseException]) -> None:
    denoiser = transformer().requires_grad_(False)

    def fail(*_: object) -> None:
        raise error

    with ditattn.install(denoiser, "rain_fusion_attn", **SPARSE) as handle:
        with denoiser.blocks[1].attn1.register_forward_pre_hook(fail), pytest.raises(error):
            _forward(denoiser, 900)
        _forward(denoiser, 600)
    cells = handle._stage.models[0].log.cells
    assert {layer: cell.sparse for (step, layer), cell in cells.items() if step == 0} == {0: 2, 1: 1}
    assert running() is None


def test_an_interrupted_installation_leaves_no_forward_behind() -> None:
    denoiser = transformer().requires_grad_(False)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = ditattn.install(denoiser, "rain_fusion_attn", **SPARSE)
    with denoiser.blocks[1].register_forward_pre_hook(interrupt), pytest.raises(KeyboardInterrupt):
        _forward(denoiser, 900)
    handle.remove()
    assert running() is None


def test_step_overrides_every_source() -> None:
    denoiser = transformer().requires_grad_(False)
    with ditattn.install(denoiser, "rain_fusion_attn", **{**SPARSE, "skip_first_steps": "50%"}) as handle:
        for index in range(4):
            with ditattn.step(index, 4):
                _forward(denoiser, 500)
    report = handle.report().components["WanTransformer3DModel"]
    assert report.step_sources == {"override": 4}
    assert sparse_steps(report) == [2, 3]


def test_a_share_of_an_unknown_number_of_steps_is_dense_and_says_so() -> None:
    denoiser = transformer().requires_grad_(False)
    with ditattn.install(denoiser, "rain_fusion_attn", **{**SPARSE, "skip_first_steps": "50%"}) as handle:
        _forward(denoiser, 500)
    assert handle.report().components["WanTransformer3DModel"].dense_reasons == {"number of steps unknown": 2}


def _forward(denoiser: nn.Module, timestep: int) -> None:
    latents, text = torch.randn(1, 16, 5, 32, 32), torch.randn(1, 8, 24)
    denoiser(hidden_states=latents, timestep=torch.tensor([timestep]), encoder_hidden_states=text)


# several installations, and neighbours


def test_two_installations_do_not_know_each_other() -> None:
    one, other = tiny_pipelines.wan(), tiny_pipelines.flux()
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


def test_cross_attention_that_shares_a_processor_stays_native() -> None:
    tiny = tiny_pipelines.wan()
    processor = tiny.pipe.transformer.blocks[0].attn1.processor
    tiny.pipe.transformer.set_attn_processor(processor)
    before = footprint(tiny.pipe)
    report = ran(tiny, **SPARSE)
    assert (report.calls, report.sparse) == (12, 12)
    assert footprint(tiny.pipe) == before


@pytest.mark.parametrize("later", ["hook", "accelerate"])
def test_what_was_wrapped_around_the_denoiser_later_survives_the_removal(later: str) -> None:
    tiny = tiny_pipelines.wan()
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
    tiny = tiny_pipelines.wan()
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


def test_an_unknown_family_stays_as_it_was_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tiny = tiny_pipelines.wan()
    native = tiny.run(1)
    tiny.pipe.transformer = UnknownTransformer(tiny.pipe.transformer)
    with caplog.at_level(logging.WARNING, logger="ditattn"), ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE) as handle:
        assert torch.equal(tiny.run(1), native)
    report = handle.report()
    assert report.components == {}
    assert "UnknownTransformer is not a known model family" in report.not_served["transformer"]
    assert "UnknownTransformer" in report.summary()
    assert "UnknownTransformer" in caplog.text
    with pytest.raises(UnsupportedModel, match="UnknownTransformer"):
        ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True)


def test_context_parallelism_is_refused() -> None:
    tiny = tiny_pipelines.wan()
    tiny.pipe.transformer.blocks[0].attn1.processor._parallel_config = object()
    with pytest.raises(UnsupportedModel, match="context parallelism"):
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


def test_strict_raises_for_a_reason_that_nobody_asked_for() -> None:
    tiny = _qwen_with_gaps()
    with (
        ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **SPARSE),
        pytest.raises(DenseInStrictMode, match="step 0: mask with gaps"),
    ):
        tiny.run(1)


def test_strict_accepts_the_dense_steps_and_layers_that_were_asked_for(wan: TinyPipeline) -> None:
    report = ran(wan, strict=True, **{**SPARSE, "skip_first_steps": 1, "skip_layers": "0"})
    assert report.sparse == 2 * 2


def test_prompts_of_unequal_length_run_densely_with_the_reason() -> None:
    tiny = _qwen_with_gaps()
    native = tiny.run(2)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE) as handle:
        out = tiny.run(2)
    report = handle.report().components["transformer"]
    # only the prompts are of unequal length, the negative prompts are not
    assert report.dense_reasons == {"mask with gaps": 4}
    assert report.sparse == 4
    with ditattn.install(tiny.pipe, "torch_sdpa"):
        torch.testing.assert_close(tiny.run(2), native, rtol=0, atol=1e-5)
    assert not torch.equal(out, native)


def _qwen_with_gaps() -> TinyPipeline:
    tiny = tiny_pipelines.qwen_image(batch=2)
    tiny.arguments["prompt_embeds_mask"][1, 4:] = 0
    return tiny


def test_wrong_requests_are_refused_and_leave_no_trace(wan: TinyPipeline) -> None:
    before = footprint(wan.pipe)
    with pytest.raises(UnknownBackend, match="did you mean 'rain_fusion_attn'"):
        ditattn.install(wan.pipe, "rain_fusion")
    with pytest.raises(UnknownKey, match="did you mean 'sparsity'"):
        ditattn.install(wan.pipe, "rain_fusion_attn", sparcity=0.5)
    with pytest.raises(ConfigError, match="sparsity"):
        ditattn.install(wan.pipe, "rain_fusion_attn", sparsity=1.0)
    with pytest.raises(ConfigError, match="layers 0-1"):
        ditattn.install(wan.pipe, "rain_fusion_attn", skip_layers="7")
    with pytest.raises(UnsupportedModel, match="no denoiser named transformer_9; there is transformer"):
        ditattn.install(wan.pipe, components={"transformer_9": "fa"})
    with pytest.raises(ConfigError, match="not int"):
        ditattn.install(3, "fa")
    with pytest.raises(UnsupportedHeadSize, match="32, 64, 96, 128, not 24"):
        ditattn.install(transformer(attention_head_dim=24), "rain_fusion_attn")
    assert footprint(wan.pipe) == before
