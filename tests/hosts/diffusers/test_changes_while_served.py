"""What users do to a served model, and beside it: fused projections, 8-bit storage, threads, many installations, other sizes."""

from __future__ import annotations

import gc
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import reset

import ditattn
from tiny_pipelines import FAMILIES, TinyPipeline, few_tokens
from tiny_pipelines.footprint import footprint
from tiny_pipelines.pipeline import noise
from tiny_pipelines.wan import transformer

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = {"sparsity": 0.6, "skip_first_steps": 0, "min_tokens": 0}

FUSE, UNFUSE, INSTALL, REMOVE = "fuse", "unfuse", "install", "remove"
ORDERS = [
    order
    for size in (2, 3, 4)
    for order in itertools.permutations((FUSE, UNFUSE, INSTALL, REMOVE), size)
    if INSTALL in order
    and FUSE in order
    and (UNFUSE not in order or order.index(FUSE) < order.index(UNFUSE))
    and (REMOVE not in order or order.index(INSTALL) < order.index(REMOVE))
]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("wan", "cogvideox") else [pytest.mark.slow]) for name in FAMILIES]
)
def test_projections_fused_in_every_order(name: str) -> None:
    tiny = few_tokens(FAMILIES[name](), name)
    native, model = tiny.run(1), tiny.pipe.transformer
    assert len(ORDERS) == 14
    for order in ORDERS:
        handle = None
        for what in order:
            if what == INSTALL:
                handle = ditattn.install(tiny.pipe, "torch_sdpa")
            elif what == REMOVE:
                assert handle is not None
                handle.remove()
            else:
                getattr(model, f"{what}_qkv_projections")()
        torch.testing.assert_close(tiny.run(1), native, rtol=0, atol=1e-5, msg=f"{order}")
        assert handle is not None
        handle.remove()
        if UNFUSE not in order:
            model.unfuse_qkv_projections()
        torch.testing.assert_close(tiny.run(1), native, rtol=0, atol=1e-5, msg=f"after {order}")


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_stored_in_8_bits(name: str) -> None:
    tiny = few_tokens(FAMILIES[name](), name)
    tiny.pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    native = tiny.run(1)
    with ditattn.install(tiny.pipe, "torch_sdpa"):
        torch.testing.assert_close(tiny.run(1), native, rtol=0, atol=1e-5)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **SPARSE) as handle:
        tiny.run(1)
    assert handle.report().components["transformer"].dense == 0
    assert torch.equal(tiny.run(1), native)


def test_two_threads_on_two_pipelines() -> None:
    pipelines = [few_tokens(FAMILIES[name](), name) for name in ("wan", "qwen image")]
    backends = ("rain_fusion_attn", "block_sparse_attn")
    handles = [ditattn.install(tiny.pipe, backend, **SPARSE) for tiny, backend in zip(pipelines, backends, strict=True)]
    alone = [tiny.run(3) for tiny in pipelines]
    before = [handle.report().components["transformer"] for handle in handles]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda tiny: [tiny.run(3) for _ in range(3)], pipelines))
    for expected, found in zip(alone, together, strict=True):
        assert all(torch.equal(latents, expected) for latents in found)
    for handle, once in zip(handles, before, strict=True):
        report = handle.report().components["transformer"]
        assert (report.sparse, report.dense) == (4 * once.sparse, 0)
        handle.remove()


def test_two_threads_on_one_bare_transformer() -> None:
    model = transformer().requires_grad_(False)
    inputs = [noise(1, 16, 5, 32, 32, seed=seed) for seed in (1, 2)]

    def forward(latents: Tensor) -> Tensor:
        out: Tensor = model(hidden_states=latents, timestep=torch.tensor([500]), encoder_hidden_states=noise(1, 8, 24), return_dict=False)[
            0
        ]
        return out

    with ditattn.install(model, "rain_fusion_attn", **SPARSE) as handle:
        alone = [forward(latents) for latents in inputs]
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(lambda latents: [forward(latents) for _ in range(4)], inputs))
    for expected, found in zip(alone, together, strict=True):
        assert all(torch.equal(out, expected) for out in found)
    assert handle.report().components["WanTransformer3DModel"].sparse == 2 * (2 + 8)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_a_hundred_installations_leave_nothing(name: str) -> None:
    tiny = FAMILIES[name]()
    before = footprint(tiny.pipe)

    def install() -> None:
        with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE):
            pass

    def alive() -> int:
        gc.collect()
        return sum(str(type(thing).__module__).startswith("ditattn.") for thing in gc.get_objects())

    install()
    once = alive()
    for _ in range(100):
        install()
    assert alive() == once
    assert footprint(tiny.pipe) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "qwen image"])
def test_a_compiled_model_with_changing_sizes(name: str) -> None:
    sizes: list[dict[str, Any]] = [{"height": 224, "width": 320}, {"height": 256, "width": 256}, {"height": 320, "width": 224}]
    reset()
    found: list[list[tuple[Any, ...]]] = []
    latents: list[list[Tensor]] = []
    for compiled in (False, True):
        tiny: TinyPipeline = FAMILIES[name]()
        if compiled:
            tiny.pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
        with ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **SPARSE) as handle:
            latents.append([tiny.run(2, **size) for size in (*sizes, *sizes)])
        report = handle.report().components["transformer"]
        found.append([(report.sparse, report.dense, report.sparse_density_by_step, report.sparse_density_by_layer)])
    reset()
    assert found[0] == found[1]
    for eager, own in zip(*latents, strict=True):
        torch.testing.assert_close(own, eager, rtol=0, atol=1e-5)


def test_scores_beyond_the_largest_number_of_fp16() -> None:
    """Logits of 2e5 before scaling: whoever forms them in fp16 makes infinities."""
    q, k, v = (x.half() for x in (noise(1, 300, 2, 64) * 60, noise(1, 300, 2, 64, seed=2) * 60, noise(1, 300, 2, 64, seed=3)))
    assert (q[0, :, 0].float() @ k[0, :, 0].float().T).abs().max() > 65504
    native = nn.functional.scaled_dot_product_attention(*(x.float().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    plan = ditattn.BlockPlan.full(300, 300)
    for out in (
        ditattn.dense_attention(q, k, v),
        ditattn.dense_attention(q, k, v, implementation="torch"),
        ditattn.block_sparse_attention(q, k, v, plan),
        ditattn.block_sparse_attention(q, k, v, plan, implementation="torch"),
    ):
        torch.testing.assert_close(out.float(), native, rtol=0, atol=5e-3)
