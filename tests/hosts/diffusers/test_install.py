"""What install promises apart from the family: settings, steps, dense backends, strictness, refused requests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ditattn
import tiny_pipelines
from ditattn.backends.rain_fusion_attn import RainFusionAttentionImpl
from ditattn.backends.setting import Setting
from ditattn.errors import (
    ConfigError,
    DenseInStrictMode,
    UnknownBackend,
    UnknownKey,
    UnsupportedCall,
    UnsupportedHeadSize,
    UnsupportedModel,
)
from ditattn.hosts.diffusers.install import install_setting
from ditattn.runtime.forward import running
from ditattn.runtime.report import ComponentReport
from tiny_pipelines import TinyPipeline
from tiny_pipelines.footprint import footprint
from tiny_pipelines.wan import transformer
from wan_runs import CALLS_PER_STEP, SPARSE, ran

pytestmark = pytest.mark.usefixtures("one_thread")


def sparse_steps(report: ComponentReport) -> list[int]:
    return [step for step, density in report.sparse_density_by_step.items() if density is not None]


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


def test_one_configuration_travels_from_the_request_to_every_call(wan: TinyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, forward = [], RainFusionAttentionImpl.forward
    monkeypatch.setattr(
        RainFusionAttentionImpl, "forward", lambda self, q, k, v, metadata: seen.append(metadata.config) or forward(self, q, k, v, metadata)
    )
    setting = Setting.parse("rain_fusion_attn", SPARSE)
    with install_setting(wan.pipe, setting):
        wan.run(2)
    assert len(seen) == 2 * CALLS_PER_STEP
    assert all(config is setting.config for config in seen)


def test_a_skipped_layer_is_dense_in_every_step(wan: TinyPipeline) -> None:
    report = ran(wan, skip_layers="1", **SPARSE)
    assert report.dense_reasons == {"skipped layer": 6}
    assert report.sparse_density_by_layer[0] is not None
    assert report.sparse_density_by_layer[1] is None


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
        densities.append(handle.report().components["transformer"].sparse_density)
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
    assert sorted(first.sparse_density_by_step) + sorted(second.sparse_density_by_step) == [0, 1, 2, 3]
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
    assert sorted(report.sparse_density_by_step) == [0, 1, 2]


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


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_bare_transformer_counts_changes_of_the_timestep(compiled: bool) -> None:
    denoiser = transformer().requires_grad_(False)
    if compiled:
        # the wrapper is what matters: it has another class name
        denoiser = torch.compile(denoiser, backend="eager")
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


# strictness and refusals


def test_strict_raises_for_a_reason_that_nobody_asked_for() -> None:
    tiny = tiny_pipelines.flux_with_hidden_image_tokens()
    with (
        ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **SPARSE),
        pytest.raises(DenseInStrictMode, match="step 0: mask with gaps"),
    ):
        tiny.run(1)


def test_strict_accepts_the_dense_steps_and_layers_that_were_asked_for(wan: TinyPipeline) -> None:
    report = ran(wan, strict=True, **{**SPARSE, "skip_first_steps": 1, "skip_layers": "0"})
    assert report.sparse == 2 * 2


def test_prompts_of_unequal_length_run_sparse() -> None:
    """The second prompt's padding stands between its text and its image."""
    tiny = _qwen_with_unequal_prompts()
    native = tiny.run(2)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **{**SPARSE, "sparsity": 0.01}) as handle:
        out = tiny.run(2)
    # of 11 blocks 1 % drops none
    torch.testing.assert_close(out, native, rtol=0, atol=1e-4)
    report = handle.report().components["transformer"]
    assert (report.sparse, report.dense) == (8, 0)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **{**SPARSE, "skip_first_steps": 1}) as handle:
        assert not torch.equal(tiny.run(2), native)
    assert handle.report().components["transformer"].dense_reasons == {"first steps": 4}


def _qwen_with_unequal_prompts() -> TinyPipeline:
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
    with pytest.raises(UnsupportedHeadSize, match=r"8, 16, \.\.\. 128, not 12"):
        ditattn.install(transformer(attention_head_dim=12), "laser_attn")
    assert footprint(wan.pipe) == before
