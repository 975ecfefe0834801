"""torch.compile: one graph serves every block and every step, and the report is as right as an eager one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import reset
from torch._dynamo.utils import counters

import ditattn
import tiny_pipelines
from ditattn.runtime.report import ComponentReport
from tiny_pipelines import TinyPipeline
from tiny_pipelines.wan import transformer

# a step that is dense, a layer that is dense: labels that are off by one change the output
SETTINGS = {"sparsity": 0.6, "skip_first_steps": 1, "min_tokens": 0, "skip_layers": "1"}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reset()
    counters.clear()
    yield
    reset()
    torch.set_num_threads(threads)


def run(tiny: TinyPipeline) -> tuple[Tensor, ComponentReport]:
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SETTINGS) as handle:
        latents = tiny.run(3)
    return latents, handle.report().components["transformer"]


def labels(report: ComponentReport) -> tuple[Any, ...]:
    return (report.calls, report.dense_reasons, report.step_sources, report.sparse_density_by_step, report.sparse_density_by_layer)


def test_repeated_blocks_share_one_graph_in_all_steps() -> None:
    eager, expected = run(tiny_pipelines.wan(transformer=transformer(num_layers=4)))
    tiny = tiny_pipelines.wan(transformer=transformer(num_layers=4))
    tiny.pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    compiled, report = run(tiny)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert labels(report) == labels(expected)
    assert set(report.dense_reasons) == {"first steps", "skipped layer"}
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)


# how many kinds of blocks with self-attention a family has
KINDS_OF_BLOCKS = {
    tiny_pipelines.wan_vace: 2,
    tiny_pipelines.wan_animate: 1,
    tiny_pipelines.skyreels_v2: 1,
    tiny_pipelines.skyreels_v2_diffusion_forcing: 1,
    tiny_pipelines.chronoedit: 1,
    tiny_pipelines.anyflow: 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("build", KINDS_OF_BLOCKS, ids=lambda build: build.__name__)
def test_each_kind_of_block_is_one_graph(build: Any) -> None:
    if build is tiny_pipelines.anyflow:
        pytest.importorskip("diffusers", minversion="0.42")
    eager, expected = run(build())
    tiny = build()
    tiny.pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    compiled, report = run(tiny)
    assert counters["stats"]["unique_graphs"] == KINDS_OF_BLOCKS[build]
    assert not counters["graph_break"]
    assert labels(report) == labels(expected)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_fakes_describe_the_real_operation() -> None:
    # aot_eager traces through the fakes and runs the operations with the strides that they promised
    eager, expected = run(tiny_pipelines.hunyuan_video())
    tiny = tiny_pipelines.hunyuan_video()
    for block in (*tiny.pipe.transformer.transformer_blocks, *tiny.pipe.transformer.single_transformer_blocks):
        block.compile(backend="aot_eager", fullgraph=True)
    compiled, report = run(tiny)
    assert labels(report) == labels(expected)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny_pipelines.wan, tiny_pipelines.cogvideox], ids=["dispatched", "calls SDPA itself"])
def test_a_whole_denoiser_is_one_graph(build: Any) -> None:
    eager, expected = run(build())
    tiny = build()
    tiny.pipe.transformer.compile(backend="eager", fullgraph=True)
    compiled, report = run(tiny)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert labels(report) == labels(expected)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compiled_blocks_are_native_again_after_leaving() -> None:
    tiny = tiny_pipelines.wan()
    native = tiny.run(3)
    tiny.pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    sparse, _ = run(tiny)
    assert not torch.equal(sparse, native)
    torch.testing.assert_close(tiny.run(3), native, rtol=0, atol=1e-5)
