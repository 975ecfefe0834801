"""torch.compile: one graph serves every block and every step, and the report is as right as an eager one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from packaging import version
from torch import Tensor, nn
from torch._dynamo import reset
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

import ditattn
import tiny_pipelines
from ditattn.hosts.diffusers.install import self_attention_modules
from ditattn.models import MODELS, family_of, known_class
from ditattn.runtime.report import ComponentReport
from family_cases import CASES
from tiny_pipelines import TinyPipeline, packed_images
from tiny_pipelines.wan import transformer

# a step that is dense, a layer that is dense: labels that are off by one change the output
SETTINGS = {"sparsity": 0.6, "skip_first_steps": 1, "min_tokens": 0, "skip_layers": "1"}


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # to time a graph's guards for its log, torch first empties the caches of the processor: a tenth of a second for every graph
    monkeypatch.setattr("torch._dynamo.guards.profile_guard_manager", lambda *_: 0.0, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reset()
    counters.clear()
    yield
    reset()
    torch.set_num_threads(threads)


def run(tiny: TinyPipeline, num_steps: int = 2) -> tuple[Tensor, ComponentReport]:
    """A dense step and a sparse one: what changes from step to step is another value in the second already."""
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SETTINGS) as handle:
        latents = tiny.run(num_steps)
    return latents, handle.report().components["transformer"]


def labels(report: ComponentReport) -> tuple[Any, ...]:
    return (report.calls, report.dense_reasons, report.step_sources, report.sparse_density_by_step, report.sparse_density_by_layer)


@pytest.mark.skipif(
    version.parse("2.11") > version.parse(torch.__version__), reason="before torch 2.11 hooks of modules have graphs of their own"
)
def test_repeated_blocks_share_one_graph_in_all_steps() -> None:
    eager, expected = run(tiny_pipelines.wan(transformer=transformer(num_layers=4)), 3)
    tiny = tiny_pipelines.wan(transformer=transformer(num_layers=4))
    tiny.pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    compiled, report = run(tiny, 3)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert labels(report) == labels(expected)
    assert set(report.dense_reasons) == {"first steps", "skipped layer"}
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)


# a denoiser that another case has too
AGAIN = {"wan image to video", "wan, two transformers", "cogvideox, DDIM"}
BREAKING = {"hidream": "tokens_per_expert"}
"""Families whose own code breaks graphs, and what torch.compile names: HiDream counts the tokens of each expert in Python."""
BUILDS = {name: case.build for name, case in CASES.items() if name not in AGAIN} | {"qwen image 2.1": packed_images.qwen_image21}
every_family_but_breaking = pytest.mark.parametrize("name", [name for name in BUILDS if name not in BREAKING])
# blocks of two kinds, or of one kind that runs in two ways; the step that fills the cache of Qwen-Image 2.1 is one more graph
GRAPHS = {"qwen image 2.1": 3} | dict.fromkeys(
    (
        "hunyuan video",
        "flux",
        "flux kontext",
        "cogvideox, DPM",
        "wan vace",
        "framepack",
        "mochi",
        "motif video",
        "easyanimate",
        "consisid",
        "flux 2",
        "chroma",
        "bria",
        "bria fibo",
        "longcat image",
        "ovis image",
        "hunyuan image",
        "aura flow",
        "cogview 3 plus",
        "z image",
        "lumina 2",
        "pixart",
    ),
    2,
)
"""How many graphs the blocks of a family make natively, where it is not one."""
# a graph; two kinds of blocks; one kind with two graphs; a graph that runs in the first step alone
KINDS_OF_GRAPHS = {"ltx video", "chroma", "pixart", "qwen image 2.1"}
newest = pytest.mark.skipif(version.parse("0.42") > version.parse(diffusers.__version__), reason="an older diffusers has fewer families")


@pytest.mark.slow
@newest
def test_every_family_is_compiled_here() -> None:
    compiled = {known_class(build().pipe.transformer) for build in BUILDS.values()}
    assert compiled == {name for family in MODELS for name in family.transformer_classes}


@cache
def eagerly(name: str) -> tuple[Tensor, ComponentReport]:
    return run(BUILDS[name]())


def in_blocks(name: str) -> TinyPipeline:
    """A pipeline whose blocks are compiled, each for itself."""
    tiny = BUILDS[name]()
    for block in blocks(tiny.pipe.transformer):
        block.compile(backend="eager", fullgraph=True)
    return tiny


@pytest.mark.shows("compiled")
@pytest.mark.slow
@newest
@every_family_but_breaking
def test_blocks_make_as_many_graphs_as_natively(name: str) -> None:
    eager, expected = eagerly(name)
    compiled, report = run(in_blocks(name))
    assert counters["stats"]["unique_graphs"] == GRAPHS.get(name, 1)
    assert not counters["graph_break"]
    assert labels(report) == labels(expected)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)


@newest
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in KINDS_OF_GRAPHS else pytest.mark.long)
        for name in BUILDS
        if name not in BREAKING
    ],
)
def test_so_many_graphs_are_made_natively(name: str) -> None:
    in_blocks(name).run(2)
    assert counters["stats"]["unique_graphs"] == GRAPHS.get(name, 1)


@pytest.mark.shows("compiled", says="graph breaks")
@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKING)
def test_blocks_that_break_graphs_by_themselves_are_served_all_the_same(name: str) -> None:
    build = BUILDS[name]
    tiny = build()
    for block in blocks(tiny.pipe.transformer):
        block.compile(backend="eager", fullgraph=True)
    with pytest.raises(TorchDynamoException, match=BREAKING[name]):
        tiny.run(1)
    eager, expected = eagerly(name)
    breaks = []
    for serve in (lambda tiny: (tiny.run(2), None), run):
        reset()
        counters.clear()
        tiny = build()
        for block in blocks(tiny.pipe.transformer):
            block.compile(backend="eager")
        compiled, report = serve(tiny)
        breaks.append(len(counters["graph_break"]))
    assert breaks[0] == breaks[1] > 0
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


# masked text before the image, SDPA calls of its own, text as keys only, key padding, layers of the image alone, code that breaks graphs
KINDS = {"chroma", "stable diffusion 3", "prx", "ernie image", "z image", "hidream"}


@newest
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in KINDS else pytest.mark.long) for name in BUILDS])
def test_calls_of_a_compiled_denoiser_are_counted_as_those_of_an_eager_one(name: str) -> None:
    """Whatever breaks its graphs: layers are counted inside the operation."""
    eager, expected = eagerly(name)
    tiny = BUILDS[name]()
    tiny.pipe.transformer.compile(backend="eager")
    compiled, report = run(tiny)
    assert labels(report) == labels(expected)
    assert report.sparse > 0
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compiled_blocks_are_native_again_after_leaving() -> None:
    tiny = tiny_pipelines.wan()
    native = tiny.run(2)
    tiny.pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    sparse, _ = run(tiny)
    assert not torch.equal(sparse, native)
    torch.testing.assert_close(tiny.run(2), native, rtol=0, atol=1e-5)
