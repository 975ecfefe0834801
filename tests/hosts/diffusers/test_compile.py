"""torch.compile: one graph serves every block and every step, and the report is as right as an eager one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from packaging import version
from torch import Tensor, nn
from torch._dynamo import reset
from torch._dynamo.utils import counters

import ditattn
import tiny_pipelines
from ditattn.hosts.diffusers.install import self_attention_modules
from ditattn.models import family_of
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


# not Mochi: its processors ask which text tokens are real, which breaks graphs
COMPILED = [
    tiny_pipelines.wan_vace,
    tiny_pipelines.wan_animate,
    tiny_pipelines.skyreels_v2,
    tiny_pipelines.skyreels_v2_diffusion_forcing,
    tiny_pipelines.chronoedit,
    tiny_pipelines.anyflow,
    tiny_pipelines.hunyuan_video15,
    tiny_pipelines.hunyuan_video_framepack,
    tiny_pipelines.ltx2,
    tiny_pipelines.cosmos,
    tiny_pipelines.kandinsky5,
    tiny_pipelines.kandinsky6,
    tiny_pipelines.motif_video,
    tiny_pipelines.helios,
    tiny_pipelines.allegro,
    tiny_pipelines.easyanimate,
    tiny_pipelines.consisid,
    tiny_pipelines.minimax_h3,
]


@pytest.mark.slow
@pytest.mark.skipif(version.parse("0.42") > version.parse(diffusers.__version__), reason="an older diffusers has fewer families")
@pytest.mark.parametrize("build", COMPILED, ids=lambda build: build.__name__)
def test_blocks_make_as_many_graphs_as_natively(build: Any) -> None:
    eager, expected = run(build())
    graphs = []
    for serve in (lambda tiny: (tiny.run(3), None), run):
        reset()
        counters.clear()
        tiny = build()
        for block in blocks(tiny.pipe.transformer):
            block.compile(backend="eager", fullgraph=True)
        compiled, report = serve(tiny)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] <= 2
    assert not counters["graph_break"]
    assert labels(report) == labels(expected)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)


def blocks(transformer: Any) -> list[nn.Module]:
    """Those with self-attention, such as `transformer_blocks.0`."""
    family = family_of(transformer)
    assert family is not None
    paths = {".".join(path.split(".")[:2]) for path in self_attention_modules(transformer, family)}
    return [transformer.get_submodule(path) for path in paths]


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
