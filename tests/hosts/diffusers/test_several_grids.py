"""Pipelines whose sequences hold several grids: references, layers and conditions are as sparse as the picture itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import diffusers
import pytest
import torch
from packaging import version
from torch import Tensor

import ditattn
import tiny_pipelines
from ditattn.runtime.stage import DenoisingStage
from pairwise import each_with_one
from tiny_pipelines import TinyPipeline, packed_images

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_STEPS, NUM_LAYERS = 1, 2
BACKENDS = ("rain_fusion_attn", "block_sparse_attn", "permuted_sparse_attn")

# the pipeline, its token grids as the report writes them, forwards per step
CASES: dict[str, tuple[Callable[[], TinyPipeline], str, int]] = {
    "flux kontext": (lambda: tiny_pipelines.flux_kontext((30, 44)), "1x30x44 + 1x30x44", 2),
    "qwen image edit, one reference": (tiny_pipelines.qwen_image_edit, "1x32x32 + 1x32x32", 2),
    "qwen image edit, two references": (tiny_pipelines.qwen_image_edit_plus, "1x24x40 + 1x32x32 + 1x16x64", 2),
    "qwen image layered": (tiny_pipelines.qwen_image_layered, "1x40x40 + 1x40x40 + 1x40x40", 2),
    "flux 2": (lambda: packed_images.flux2((32, 32)), "1x30x44 + 1x32x32", 1),
    "ltx, text only": (tiny_pipelines.ltx_condition, "5x16x16", 1),
    "ltx, condition on frame 0": (lambda: tiny_pipelines.ltx_condition((0, 1)), "5x16x16", 1),
    "ltx, condition in the middle": (lambda: tiny_pipelines.ltx_condition((4, 1)), "5x16x16 + 1x16x16", 1),
    "ltx, three conditions": (lambda: tiny_pipelines.ltx_condition((0, 1), (2, 1), (6, 3)), "5x16x16 + 1x16x16 + 2x16x16", 1),
}
cases = pytest.mark.parametrize("name", CASES)
# their packed tokens are not all of one tensor
BESIDE: dict[str, tuple[Callable[[], TinyPipeline], str, int]] = {
    "ltx 2, keyframe": (lambda: tiny_pipelines.ltx2(keyframe=True), "5x14x20 + 1x14x20", 1),
    "minimax h3, keyframe": (lambda: tiny_pipelines.minimax_h3(keyframe=True), "5x14x20 + 1x14x20", 2),
}
newest = pytest.mark.skipif(version.parse(diffusers.__version__) < version.parse("0.42"), reason="an older diffusers does not have them")
all_cases = pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=newest) for name in BESIDE)])


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    return [newest] if name in BESIDE else []


@cache
def built(name: str) -> tuple[TinyPipeline, Tensor]:
    """A pipeline, which each test leaves as it was, and its native latents."""
    tiny = {**CASES, **BESIDE}[name][0]()
    return tiny, tiny.run(NUM_STEPS)


def marks_beside_the_first(name: str, backend: str) -> list[pytest.MarkDecorator]:
    # so many tokens take as long as all others; two references have as many grids
    return [*marks_of(name), *([pytest.mark.long] if name == "qwen image layered" and backend != BACKENDS[0] else [])]


@pytest.mark.shows("references")
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, backend, marks=marks_beside_the_first(name, backend), id=f"{backend}-{name}")
        for backend in BACKENDS
        for name in [*CASES, *BESIDE]
    ],
)
def test_density_is_near_what_was_asked(name: str, backend: str) -> None:
    tiny, native = built(name)
    _, grids, forwards = {**CASES, **BESIDE}[name]
    # the tiny clips have so few frames that their first ones alone would be half of all keys
    settings = {"sparsity": 0.75, "skip_first_steps": 0, "min_tokens": 0, "first_frame_sink": False}
    with ditattn.install(tiny.pipe, backend, strict=True, **settings) as handle:
        out = tiny.run(NUM_STEPS)
    ran = handle.report().components["transformer"]
    assert ran.sparse == NUM_STEPS * forwards * NUM_LAYERS
    assert ran.dense == 0
    assert ran.sparse_density < 0.5
    assert ran.token_grids == {grids: NUM_STEPS * forwards}
    assert (f"forwards by token grids: {grids}: {NUM_STEPS * forwards}" in ran.sentence()) is ("+" in grids)
    assert out.isfinite().all()
    assert 1e-3 < (out - native).abs().max() < 0.3


@all_cases
def test_leaving_leaves_no_trace(name: str) -> None:
    tiny, native = built(name)
    for backend in BACKENDS:
        with ditattn.install(tiny.pipe, backend, sparsity=0.75, skip_first_steps=0, min_tokens=0):
            tiny.run(1)
    assert torch.equal(tiny.run(NUM_STEPS), native)


@pytest.mark.parametrize(("name", "backend"), each_with_one([*CASES, *BESIDE], BACKENDS, marks=marks_of))
def test_sparsity_zero_is_native(name: str, backend: str) -> None:
    tiny, native = built(name)
    with ditattn.install(tiny.pipe, backend, sparsity=0) as handle:
        out = tiny.run(NUM_STEPS)
    torch.testing.assert_close(out, native, rtol=0, atol=1e-4)
    assert list(handle.report().components["transformer"].dense_reasons) == ["sparsity 0"]


@pytest.mark.parametrize(("name", "backend"), each_with_one([*CASES, *BESIDE], BACKENDS, start=1, marks=marks_of))
def test_keeping_every_block_through_the_sparse_kernel_is_native(name: str, backend: str) -> None:
    tiny, native = built(name)
    # the nucleus keeps all but a millionth of the mass, where a sparsity above 0 would drop a block of every grid
    nothing = {"sparsity": 0, "threshold": 1 - 1e-6} if backend == "block_sparse_attn" else {"sparsity": 1e-5}
    with ditattn.install(tiny.pipe, backend, skip_first_steps=0, min_tokens=0, **nothing) as handle:
        out = tiny.run(NUM_STEPS)
    torch.testing.assert_close(out, native, rtol=0, atol=1e-4)
    ran = handle.report().components["transformer"]
    assert (ran.dense, ran.sparse_density) == (0, 1.0)


@cases
def test_every_grid_stands_where_the_layout_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed tokens of one grid, as the model gets them, are the keys that move in the first layer."""
    tiny, _ = built(name)
    recorded, calls = [], []
    served = DenoisingStage.attend

    def record(stage: DenoisingStage, forward: object, query: Tensor, key: Tensor, *rest: object) -> Tensor:
        if forward.num_calls == 0:
            recorded.append((key.clone(), forward.layout))
        return served(stage, forward, query, key, *rest)

    monkeypatch.setattr(DenoisingStage, "attend", record)
    transformer = tiny.pipe.transformer
    spy = transformer.register_forward_pre_hook(lambda _module, _args, arguments: calls.append(dict(arguments)), with_kwargs=True)
    with spy, ditattn.install(tiny.pipe, "torch_sdpa"):
        tiny.run(1)
        packed, layout = calls[0]["hidden_states"], recorded[0][1]
        length = recorded[0][0].shape[1]
        starts = sorted([layout.num_prefix_tokens, *(grid.start for grid in layout.further_grids)])
        # what stands before the first grid is text, which the model gets apart
        text, edges = starts[0], [*starts, length]
        assert packed.shape[1] == length - text
        for start, stop in itertools.pairwise(edges):
            recorded.clear()
            for changed in (0, 1):
                moved = packed.clone()
                moved[:, start - text : stop - text] += changed
                transformer(**{**calls[0], "hidden_states": moved})
            (before, _), (after, _) = recorded
            places = (before != after).any(-1).any(-1).any(0).nonzero().flatten()
            assert (int(places[0]), int(places[-1]) + 1, len(places)) == (start, stop, stop - start)


def test_kontext_compiled_gives_the_same() -> None:
    tiny = tiny_pipelines.flux_kontext((30, 44))
    settings = {"sparsity": 0.75, "skip_first_steps": 1, "min_tokens": 0}
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **settings):
        eager = tiny.run(2)
    torch._dynamo.reset()
    tiny.pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **settings) as handle:
        compiled = tiny.run(2)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)
    assert handle.report().components["transformer"].sparse_density < 0.5
