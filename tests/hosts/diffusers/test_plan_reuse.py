"""Reuse of plans in a pipeline: who made a plan, by step, layer and branch, and when plans are forgotten."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import reset
from torch._dynamo.utils import counters

import ditattn
import tiny_pipelines
from ditattn.backends.rain_fusion_attn import RainFusionAttentionImpl
from ditattn.backends.setting import Setting
from ditattn.compare.setting import Clip
from ditattn.hosts.diffusers.workload import PipelineWorkload
from ditattn.plan.block_plan import BlockPlan
from ditattn.runtime.forward import running
from ditattn.runtime.report import ComponentReport
from tiny_pipelines import TinyPipeline, few_tokens
from tiny_pipelines.wan import transformer

SPARSE = {"sparsity": 0.6, "skip_first_steps": 0, "min_tokens": 0}
LAYERS, BRANCHES = 2, 2


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def wan() -> TinyPipeline:
    return few_tokens(tiny_pipelines.wan(), "wan")


class Made:
    """Plans as they are made: how many per (step, branch), and weak references to them."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[int | None, str | None]] = Counter()
        self.plans: list[weakref.ref[Tensor]] = []

    def by_step(self) -> dict[int | None, int]:
        steps: Counter[int | None] = Counter()
        for (step, _), count in self.counts.items():
            steps[step] += count
        return dict(steps)

    def alive(self) -> int:
        gc.collect()
        return sum(plan() is not None for plan in self.plans)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    found, make = Made(), RainFusionAttentionImpl.plan

    def counting(self: Any, query: Tensor, key: Tensor, metadata: Any, *rest: Any) -> BlockPlan:
        forward = running()
        found.counts[metadata.current_timestep, forward.id.branch if forward else None] += 1
        plan = make(self, query, key, metadata, *rest)
        found.plans.append(weakref.ref(plan.indices))
        return plan

    monkeypatch.setattr(RainFusionAttentionImpl, "plan", counting)
    return found


def ran(tiny: TinyPipeline, num_steps: int = 4, **config: Any) -> tuple[Tensor, ComponentReport]:
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **{**SPARSE, **config}) as handle:
        latents = tiny.run(num_steps)
    return latents, handle.report().components["transformer"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {(step, branch): LAYERS for step in range(4) for branch in ("cond", "uncond")}),
        ({"plan_refresh_steps": 3}, {(step, branch): LAYERS for step in (0, 3) for branch in ("cond", "uncond")}),
        ({"share_plan_between_branches": True}, {(step, "cond"): LAYERS for step in range(4)}),
        ({"plan_refresh_steps": 2, "share_plan_between_branches": True}, {(step, "cond"): LAYERS for step in (0, 2)}),
        ({"plan_refresh_steps": 3, "skip_first_steps": 1}, {(1, branch): LAYERS for branch in ("cond", "uncond")}),
        ({"plan_refresh_steps": 9, "skip_layers": "1"}, {(0, branch): 1 for branch in ("cond", "uncond")}),
    ],
    ids=str,
)
def test_who_makes_a_plan(wan: TinyPipeline, made: Made, config: dict[str, Any], expected: dict[Any, int]) -> None:
    _, report = ran(wan, **config)
    assert dict(made.counts) == expected
    assert report.sparse == report.calls - report.dense
    assert report.reused_plans == report.sparse - sum(expected.values())
    assert report.not_reused_reasons == {}


def test_reuse_changes_the_result_only_where_it_happens(wan: TinyPipeline) -> None:
    plain, without = ran(wan)
    assert torch.equal(ran(wan, plan_refresh_steps=1, share_plan_between_branches=False)[0], plain)
    assert (without.reused_plans, without.not_reused_reasons) == (0, {})
    reused, report = ran(wan, plan_refresh_steps=4)
    assert not torch.equal(reused, plain)
    # the densities of calls with a reused plan are those of the plan that ran
    assert set(report.sparse_density_by_step.values()) == {report.sparse_density_by_step[0]}
    assert f"; {report.reused_plans} with a reused plan)" in report.sentence()


def test_two_runs_of_one_installation_share_nothing(wan: TinyPipeline, made: Made) -> None:
    with ditattn.install(wan.pipe, "rain_fusion_attn", plan_refresh_steps=9, **SPARSE) as handle:
        first = wan.run(2)
        assert made.alive() == 0, "the end of a run releases its plans"
        assert torch.equal(wan.run(2), first)
        report = handle.report().components["transformer"]
    assert made.by_step() == {0: 2 * LAYERS * BRANCHES}
    assert report.reused_plans == 2 * LAYERS * BRANCHES


def test_a_run_that_fails_leaves_no_plan_to_the_next(wan: TinyPipeline, made: Made) -> None:
    def fail(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        raise ZeroDivisionError

    with ditattn.install(wan.pipe, "rain_fusion_attn", plan_refresh_steps=9, **SPARSE):
        with pytest.raises(ZeroDivisionError):
            wan.run(3, callback_on_step_end=fail)
        wan.run(2)
    assert made.by_step() == {0: 2 * LAYERS * BRANCHES}
    assert made.alive() == 0


def bare_forward(model: Any, timestep: float) -> None:
    model(
        hidden_states=torch.ones(1, 16, 5, 28, 40),
        timestep=torch.tensor([timestep]),
        encoder_hidden_states=torch.ones(1, 8, model.config.text_dim),
        return_dict=False,
    )


def test_a_bare_denoiser_tells_branches_by_their_place_and_runs_by_their_timesteps(made: Made) -> None:
    model = transformer().eval().requires_grad_(False)
    with ditattn.install(model, "rain_fusion_attn", plan_refresh_steps=2, **SPARSE) as handle:
        for timestep in (900, 900, 600, 600, 900, 900):
            bare_forward(model, timestep)
        assert made.by_step() == {0: 2 * LAYERS * BRANCHES}
        assert made.alive() == LAYERS * BRANCHES, "the plans of the first run are gone"
    assert made.alive() == 0, "the installation is gone"
    assert handle.report().components["WanTransformer3DModel"].reused_plans == LAYERS * BRANCHES


@pytest.mark.parametrize("config", [{"plan_refresh_steps": 2}, {"share_plan_between_branches": True}], ids=str)
def test_registered_names_take_the_configuration(wan: TinyPipeline, made: Made, config: dict[str, Any]) -> None:
    registration = ditattn.register(**SPARSE, **config)
    try:
        wan.pipe.transformer.set_attention_backend("rain_fusion_attn")
        wan.run(4)
    finally:
        wan.pipe.transformer.reset_attention_backend()
        registration.remove()
    # nothing names the branches here: at step 0 each makes its own plan, since another run may begin there
    expected = {0: 4, 2: 4} if "plan_refresh_steps" in config else {0: 4, 1: 2, 2: 2, 3: 2}
    assert made.by_step() == expected
    assert made.alive() == 0
    assert registration.report().components["WanTransformer3DModel"].reused_plans == 16 - sum(expected.values())


def test_equally_padded_text_reuses_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_pipelines.hunyuan_video()
    padded = []
    serve = RainFusionAttentionImpl.forward
    monkeypatch.setattr(
        RainFusionAttentionImpl,
        "forward",
        lambda self, q, k, v, metadata: padded.append(metadata.known_key_lengths) or serve(self, q, k, v, metadata),
    )
    _, report = ran(tiny, 4, plan_refresh_steps=2)
    assert all(padded), "this pipeline pads its text"
    assert report.reused_plans == report.sparse // 2
    assert report.not_reused_reasons == {}


def test_the_probe_of_compare_and_tune_tries_reuse_as_a_run_would(made: Made) -> None:
    tiny = few_tokens(tiny_pipelines.wan(), "wan")
    arguments = {**tiny.arguments, "num_inference_steps": 3}
    workload = PipelineWorkload(tiny.pipe, lambda _: arguments)
    workload.probe([Setting.parse("rain_fusion_attn", {**SPARSE, "plan_refresh_steps": 2})], Clip("", 0))
    assert made.by_step() == {0: LAYERS * BRANCHES, 2: LAYERS * BRANCHES}


def test_compiled_blocks_reuse_plans_in_the_one_graph_of_all_steps() -> None:
    config = {"plan_refresh_steps": 2, "share_plan_between_branches": True}
    eager, expected = ran(tiny_pipelines.wan(transformer=transformer(num_layers=3)), **config)
    tiny = tiny_pipelines.wan(transformer=transformer(num_layers=3))
    reset()
    counters.clear()
    try:
        tiny.pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
        compiled, report = ran(tiny, **config)
    finally:
        reset()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert (report.sparse, report.reused_plans) == (expected.sparse, expected.reused_plans) == (24, 18)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)
