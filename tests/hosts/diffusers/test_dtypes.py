"""Dtypes other than fp32, of whole models or by `torch.autocast`: another exact kernel errs no more than the native one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditattn
import tiny_pipelines
from ditattn.runtime.attend import attend
from tiny_pipelines import FAMILIES, TinyPipeline

pytestmark = pytest.mark.usefixtures("one_thread")

# of 12 blocks or fewer, a sparsity of 1 % drops none: order, plan and sparse kernel run all the same
EVERY_BLOCK = {"sparsity": 0.01, "skip_first_steps": 0, "min_tokens": 0}
BACKENDS: dict[str, dict[str, Any]] = {
    "torch_sdpa": {},
    "laser_attn": {},
    "rain_fusion_attn": EVERY_BLOCK,
    "block_sparse_attn": EVERY_BLOCK,
}


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def in_dtype(tiny: TinyPipeline, dtype: torch.dtype) -> TinyPipeline:
    """The same pipeline with its weights, and what it is called with, in another dtype."""
    for part in tiny.pipe.components.values():
        if isinstance(part, nn.Module):
            part.to(dtype)
    given = {key: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in tiny.arguments.items()}
    return TinyPipeline(tiny.pipe, given)


HALVES: dict[str, tuple[Callable[[TinyPipeline], TinyPipeline], Callable[[], Any]]] = {
    "autocast": (lambda tiny: tiny, autocast),
    "bfloat16": (lambda tiny: in_dtype(tiny, torch.bfloat16), contextlib.nullcontext),
}


@cache
def half(name: str, how: str) -> tuple[TinyPipeline, Tensor, Tensor]:
    """A pipeline in half precision, its native latents, and the latents in full precision."""
    prepare, context = HALVES[how]
    exact = FAMILIES[name]().run(1)
    tiny = prepare(FAMILIES[name]())
    with context():
        return tiny, tiny.run(1), exact


@pytest.mark.parametrize("how", HALVES)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_as_exact_as_native(name: str, how: str, backend: str) -> None:
    tiny, native, exact = half(name, how)
    with ditattn.install(tiny.pipe, backend, **BACKENDS[backend]) as handle, HALVES[how][1]():
        out = tiny.run(1)
    report = handle.report().components["transformer"]
    assert report.sparse == (report.calls if BACKENDS[backend] else 0)
    assert out.dtype == native.dtype
    if backend == "torch_sdpa":
        assert torch.equal(out, native)
    # another kernel rounds other numbers, and what the model makes of that is of the size of native's own error; both grow with latents,
    # which guidance makes three times as large in CogVideoX as elsewhere
    assert (out - exact).norm() <= 1.2 * (native - exact).norm()
    assert (out - native).abs().max() <= 2 * (native - exact).abs().max()


@cache
def double(name: str) -> tuple[TinyPipeline, Tensor]:
    """A pipeline in float64, and its native latents."""
    tiny = in_dtype(FAMILIES[name](), torch.float64)
    return tiny, tiny.run(1)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_served_to_its_last_places(name: str, backend: str) -> None:
    tiny, native = double(name)
    with ditattn.install(tiny.pipe, backend, **BACKENDS[backend]) as handle:
        out = tiny.run(1)
    report = handle.report().components["transformer"]
    assert report.sparse == (report.calls if BACKENDS[backend] else 0)
    # whoever computes in fp32 anywhere is off by 1e-6 and more
    torch.testing.assert_close(out, native, rtol=0, atol=1e-9)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtypes", [(q, k, v) for q in DTYPES for k in DTYPES for v in DTYPES if (q, k, v).count(q) < 3], ids=str)
def test_mixed_dtypes_do_what_sdpa_does_under_autocast(dtypes: tuple[torch.dtype, ...], target: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 20, 2, 32).to(dtype) for dtype in dtypes)
    for mask in (None, torch.randn(1, 1, 20, 20), torch.ones(1, 20, dtype=torch.bool)):
        with torch.autocast("cpu", target):
            given = mask if mask is None or mask.ndim == 4 else mask[:, None, None]
            native = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=given).transpose(1, 2)
            out = attend(q, k, v, mask)
        assert out.dtype == native.dtype == target
        assert torch.equal(out, native)


def test_without_autocast_mixed_dtypes_are_refused() -> None:
    q = torch.randn(1, 20, 2, 32)
    with pytest.raises(ditattn.errors.UnsupportedCall, match="share a dtype"):
        attend(q, q, q.bfloat16())


@pytest.mark.slow
def test_a_compiled_model_under_autocast() -> None:
    tiny = tiny_pipelines.qwen_image()
    with autocast():
        native = tiny.run(1)
        tiny.pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
        with ditattn.install(tiny.pipe, "torch_sdpa"):
            out = tiny.run(1)
    assert torch.equal(out, native)
