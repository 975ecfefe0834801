"""What stands around a model and breaks replacements of attention: schedulers, callbacks, gradients, saving, moving, offloading."""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from packaging import version
from torch import Tensor, nn

import ditattn
import tiny_pipelines
from ditattn.errors import UnsupportedCall
from ditattn.runtime.forward import running
from tiny_pipelines import FAMILIES, TinyPipeline, few_tokens
from tiny_pipelines.footprint import footprint
from tiny_pipelines.pipeline import noise

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = {"sparsity": 0.6, "skip_first_steps": 0, "min_tokens": 0}
two_families = pytest.mark.parametrize("name", ["wan", "cogvideox"])


@pytest.mark.parametrize("build", [tiny_pipelines.wan, tiny_pipelines.wan_image_to_video], ids=["wan", "wan image to video"])
def test_a_second_order_scheduler_counts_every_forward_of_its_schedule(build: Any) -> None:
    """Heun calls the model twice a step: of three steps five forwards, which are the places of its schedule."""
    tiny = build()
    tiny.pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    native = tiny.run(3)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **{**SPARSE, "skip_first_steps": "20%"}) as handle:
        out = tiny.run(3)
    report = handle.report().components["transformer"]
    assert (report.steps_run, report.schedule_steps) == (5, 5)
    assert {step for step, density in report.sparse_density_by_step.items() if density is None} == {0}
    assert report.dense_reasons == {"first steps": 4}
    assert 0 < (out - native).abs().max() < 0.5
    with ditattn.install(tiny.pipe, "torch_sdpa"):
        torch.testing.assert_close(tiny.run(3), native, rtol=0, atol=1e-5)


def test_a_second_order_loop_of_the_users_own_counts_timesteps() -> None:
    """Nobody tells the step: both forwards of a step have its timestep."""
    model, scheduler = tiny_pipelines.wan().pipe.transformer, diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(3)
    latents = noise(1, 16, 5, 32, 32)
    with torch.no_grad(), ditattn.install(model, "rain_fusion_attn", **SPARSE) as handle:
        for timestep in scheduler.timesteps:
            out = model(hidden_states=latents, timestep=timestep[None], encoder_hidden_states=noise(1, 8, 24), return_dict=False)[0]
            latents = scheduler.step(out, timestep, latents, return_dict=False)[0]
    report = handle.report().components["WanTransformer3DModel"]
    assert list(report.sparse_density_by_step) == [0, 1, 2]
    assert report.sparse == 5 * 2


FEW_STEPS: dict[str, dict[str, Any]] = {
    "flux": {"sigmas": [1.0, 0.6, 0.2]},
    "qwen image": {"sigmas": [1.0, 0.6, 0.2]},
}


@pytest.mark.parametrize("name", FEW_STEPS)
def test_schedules_of_the_callers_own(name: str) -> None:
    """Distilled models come with the few noise levels that they were trained on."""
    tiny = FAMILIES[name]()
    native = tiny.run(3, **FEW_STEPS[name])
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **{**SPARSE, "skip_first_steps": 1}) as handle:
        tiny.run(3, **FEW_STEPS[name])
    report = handle.report().components["transformer"]
    assert (report.steps_run, report.schedule_steps) == (3, 3)
    assert {step for step, density in report.sparse_density_by_step.items() if density is None} == {0}
    with ditattn.install(tiny.pipe, "torch_sdpa"):
        torch.testing.assert_close(tiny.run(3, **FEW_STEPS[name]), native, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_callback_that_interrupts(name: str) -> None:
    """The rest of the run is skipped, and the next one begins at step 0."""

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = step == 1
        return tensors

    tiny = few_tokens(FAMILIES[name](), name)
    native = tiny.run(4, callback_on_step_end=stop)
    before = footprint(tiny.pipe)
    with ditattn.install(tiny.pipe, "torch_sdpa"):
        torch.testing.assert_close(tiny.run(4, callback_on_step_end=stop), native, rtol=0, atol=1e-5)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **{**SPARSE, "skip_first_steps": 1}) as handle:
        tiny.run(4, callback_on_step_end=stop)
        assert running() is None
        first = handle.report().components["transformer"]
        assert list(first.sparse_density_by_step) == [0, 1]
        tiny.run(2)
    second = handle.report().components["transformer"]
    assert list(second.sparse_density_by_step) == [0, 1]
    assert (second.sparse, second.dense) == (2 * first.sparse, 2 * first.dense)
    assert footprint(tiny.pipe) == before


@two_families
@pytest.mark.parametrize("backend", ["torch_sdpa", "rain_fusion_attn", "permuted_sparse_attn"])
def test_gradients_are_refused_in_a_sentence(name: str, backend: str) -> None:
    """Also where only an input asks for them; without the installation they flow."""
    tiny, calls = few_tokens(FAMILIES[name](), name), []
    model = tiny.pipe.transformer
    spy = model.register_forward_pre_hook(lambda _module, _args, arguments: calls.append(dict(arguments)), with_kwargs=True)
    with spy:
        tiny.run(1)
    settings = {} if backend == "torch_sdpa" else SPARSE
    latents = calls[0]["hidden_states"].clone().requires_grad_()
    with ditattn.install(model, backend, **settings):
        out = model(**{**calls[0], "hidden_states": latents})[0]
        with pytest.raises(UnsupportedCall, match="forward only, and gradients were asked for"):
            out.sum().backward()
    assert latents.grad is None
    model(**{**calls[0], "hidden_states": latents})[0].sum().backward()
    assert latents.grad is not None


@two_families
def test_a_served_model_is_saved_as_the_plain_one(name: str, tmp_path: Path) -> None:
    tiny = few_tokens(FAMILIES[name](), name)
    native, model = tiny.run(1), tiny.pipe.transformer
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE):
        served = tiny.run(1)
        model.save_pretrained(tmp_path)
        tiny.pipe.transformer = type(model).from_pretrained(tmp_path).eval().requires_grad_(False)
        # weights at other addresses may go through other kernels of torch
        torch.testing.assert_close(tiny.run(1), native, rtol=0, atol=1e-5)
        tiny.pipe.transformer = model
        assert torch.equal(tiny.run(1), served)


@two_families
def test_a_served_model_moves_to_another_dtype_and_back(name: str) -> None:
    tiny = few_tokens(FAMILIES[name](), name)
    model = tiny.pipe.transformer
    wide = {key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in tiny.arguments.items()}
    natives = {}
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        natives[dtype] = tiny.run(1, **(wide if dtype == torch.float64 else {}))
    model.to(torch.float32)
    before = footprint(tiny.pipe)
    with ditattn.install(tiny.pipe, "torch_sdpa") as handle:
        for dtype in (torch.float32, torch.float64, torch.float32):
            model.to("cpu", dtype)
            out = tiny.run(1, **(wide if dtype == torch.float64 else {}))
            assert out.dtype == natives[dtype].dtype
            torch.testing.assert_close(out, natives[dtype], rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-9)
        assert footprint(tiny.pipe) != before
    assert handle.report().components["transformer"].dense_reasons.keys() == {"dense backend"}
    assert footprint(tiny.pipe) == before


@pytest.mark.skipif(
    version.parse(diffusers.__version__) < version.parse("0.41"), reason="group offloading without an accelerator fails in this diffusers"
)
@two_families
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("later", [False, True], ids=["before", "after"])
def test_group_offloading(name: str, kind: str, later: bool) -> None:
    tiny, cpu = few_tokens(FAMILIES[name](), name), torch.device("cpu")
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE):
        expected = tiny.run(2)
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}

    def offload() -> None:
        tiny.pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **groups)

    if not later:
        offload()
    with ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **SPARSE) as handle:
        if later:
            offload()
        assert torch.equal(tiny.run(2), expected)
    assert handle.report().components["transformer"].dense == 0


@two_families
def test_weights_on_disk(name: str, tmp_path: Path) -> None:
    tiny = few_tokens(FAMILIES[name](), name)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE):
        expected = tiny.run(2)
    cpu = torch.device("cpu")
    for part in tiny.pipe.components.values():
        if isinstance(part, nn.Module) and part is not tiny.pipe.transformer:
            cpu_offload(part, cpu, offload_buffers=len(part._parameters) > 0)
    disk_offload(tiny.pipe.transformer, str(tmp_path), execution_device=cpu)
    assert next(tiny.pipe.transformer.parameters()).device.type == "meta"
    with ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **SPARSE) as handle:
        assert torch.equal(tiny.run(2), expected)
    assert handle.report().components["transformer"].dense == 0


def _with_a_scheduler_of_its_own(tiny: TinyPipeline) -> TinyPipeline:
    """Another pipeline of the same transformer."""
    parts = {key: part for key, part in tiny.pipe.components.items() if key != "scheduler"}
    return TinyPipeline(type(tiny.pipe)(**parts, scheduler=copy.deepcopy(tiny.pipe.scheduler)), tiny.arguments)


def _another_picture() -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(7)}


def _remembering(name: str, backend: str) -> TinyPipeline:
    """Of few tokens permuted_sparse_attn drops none, and has nothing to remember."""
    tiny = FAMILIES[name]()
    return tiny if backend == "permuted_sparse_attn" else few_tokens(tiny, name)


# runs long enough for residuals, and plans that outlast a step
REMEMBERING = {
    "permuted_sparse_attn": {**SPARSE, "skip_first_steps": 2},
    "rain_fusion_attn": {**SPARSE, "skip_first_steps": 2, "plan_refresh_steps": 3},
}


@pytest.mark.parametrize("backend", REMEMBERING)
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_two_pipelines_of_one_transformer_in_threads(name: str, backend: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each run is in the steps of its own scheduler, and what its layers remember is its own."""
    one = _remembering(name, backend)
    other = _with_a_scheduler_of_its_own(one)
    with ditattn.install(one.pipe, backend, **REMEMBERING[backend]) as handle:
        alone = [one.run(10), other.run(11, **_another_picture())]
        before = handle.report().components["transformer"]
        with ThreadPoolExecutor(2) as pool:
            together = [pool.submit(one.run, 10), pool.submit(other.run, 11, **_another_picture())]
        found = [run.result() for run in together]
    after = handle.report().components["transformer"]
    assert before.sparse > before.dense > 0
    assert (after.sparse, after.dense) == (2 * before.sparse, 2 * before.dense)
    assert all(torch.equal(expected, latents) for expected, latents in zip(alone, found, strict=True))
    assert "self-attention calls of this run" not in caplog.text


@pytest.mark.parametrize("backend", REMEMBERING)
def test_a_pipeline_that_runs_between_the_steps_of_another_one(backend: str) -> None:
    """As for a preview in a callback: the outer run goes on with what its layers remember."""
    one = _remembering("wan", backend)
    other = _with_a_scheduler_of_its_own(one)
    previews: list[Tensor] = []

    def preview(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 5:
            previews.append(other.run(4, **_another_picture()))
        return tensors

    with ditattn.install(one.pipe, backend, **REMEMBERING[backend]):
        alone, alone_inside = one.run(10), other.run(4, **_another_picture())
        assert torch.equal(one.run(10, callback_on_step_end=preview), alone)
    assert torch.equal(previews[0], alone_inside)


def test_what_a_finished_pipeline_left_goes_with_it() -> None:
    tiny = FAMILIES["wan"]()
    with ditattn.install(tiny.pipe, "permuted_sparse_attn", **SPARSE) as handle:
        for _ in range(3):
            _with_a_scheduler_of_its_own(tiny).run(1)
            gc.collect()
        # of the pipelines that are gone nothing, and of runs whose runner nobody named
        assert len(list(handle._stage._runs)) == 1
