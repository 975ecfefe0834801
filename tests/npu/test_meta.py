"""A tiny Wan on npu:0 in every backend: fake tensors, so that the packages' own meta kernels check each call of ours."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ditattn
from ascend_calls import BLOCK_SPARSE
from ditattn.backends.sparse import token_orders
from ditattn.devices.clock import Stopwatch
from ditattn.ops import block_mean, block_sparse_attention, dense_attention
from ditattn.ops.block_sparse_attention import TABLE, ascend
from ditattn.ops.calls import SparseCall
from ditattn.packages import Package
from ditattn.plan.token_order import TokenOrder, token_order
from ditattn.runtime import attend
from npu.fake_wan import A2, A5, GRID, Called, fake_wan
from tiny_pipelines.pipeline import HEAD_SIZE


@pytest.fixture
def _through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own operations are opaque to fake tensors; here their insides run."""
    for operation in (dense_attention, block_sparse_attention, block_mean):
        monkeypatch.setattr(operation, "_op", operation._op._init_fn)
    monkeypatch.setattr(attend, "_attend", attend._attend._init_fn)
    # the first event would start the device
    monkeypatch.setattr(Stopwatch, "measure", lambda self, device: nullcontext())
    # the order of the tokens is worked out from numbers, on the CPU; fake tensors have none
    orders = {name: token_order(name, GRID) for name in ("tile", "raster")}
    monkeypatch.setattr(token_orders, "token_order", lambda name, *_: _fake(orders[name]))


def _fake(order: TokenOrder) -> TokenOrder:
    if order.forward is None:
        return order
    forward, inverse = (torch.empty(order.length, dtype=torch.int64, device="npu") for _ in range(2))
    return replace(order, forward=forward, inverse=inverse)


@contextmanager
def served_wan(backend: str, dtype: torch.dtype, **config: Any) -> Iterator[Callable[[], list[str]]]:
    """A function that runs one forward in which the backend is past its dense steps, and names the operators."""
    with fake_wan(dtype) as (model, inputs), ditattn.install(model, backend, **config) as handle:

        def forward() -> list[str]:
            with torch.no_grad(), ditattn.step(30, 40), Called() as called:
                out = model(**inputs, return_dict=False)[0]
            assert out.device == torch.device("npu:0")
            assert out.shape == inputs["hidden_states"].shape
            return called.names

        forward.report = handle.report
        yield forward


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch, soc: Callable[[str], None]) -> Callable[..., None]:
    """A machine with torch_npu and these packages alone."""

    def invent(*packages: str, name: str = A2, cann: tuple[int, int] = (9, 0)) -> None:
        others = ("sgl_kernel_npu", "attentions", "mindiesd")
        monkeypatch.setattr(Package, "missing", lambda self: self.module in others and self.module not in packages)
        monkeypatch.setattr("ditattn.ops.ascend.cann_version", lambda: cann)
        soc(name)

    return invent


@pytest.mark.usefixtures("_through")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["block_sparse_attn", "rain_fusion_attn"])
def test_sparse_backends_reach_torch_npus_operator(backend: str, dtype: torch.dtype, only: Callable[..., None]) -> None:
    only()
    with served_wan(backend, dtype, sparsity=0.5, min_tokens=0) as forward:
        names = forward()
    assert names.count("npu.npu_block_sparse_attention") == 2, "one call per layer"


@pytest.mark.usefixtures("_through")
def test_a5_runs_bf16_through_mindiesd_and_fp16_through_torch_npu(only: Callable[..., None]) -> None:
    only("mindiesd", name=A5)
    for dtype, expected in ((torch.bfloat16, "mindiesd.block_sparse_attention"), (torch.float16, "npu.npu_block_sparse_attention")):
        with served_wan("rain_fusion_attn", dtype, sparsity=0.5, min_tokens=0) as forward:
            assert forward().count(expected) == 2


@pytest.mark.usefixtures("_through")
@pytest.mark.parametrize(("min_tokens", "warnings"), [(0, 1), (10**6, 0)], ids=["sparse", "dense"])
def test_sparse_calls_without_an_operator_are_warned_of_once(
    only: Callable[..., None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, min_tokens: int, warnings: int
) -> None:
    """No operator takes float32. A backend that runs densely has nothing to warn of but that, at the end of the run."""
    only()
    # plain torch reads the plan, and fake plans hold nothing
    monkeypatch.setattr(block_sparse_attention, "load", lambda row: lambda call: (torch.empty_like(call.query), None))
    with (
        caplog.at_level(logging.WARNING, "ditattn"),
        served_wan("rain_fusion_attn", torch.float32, sparsity=0.5, min_tokens=min_tokens) as run,
    ):
        run()
    messages = [message for record in caplog.records if "self-attention calls of this run" not in (message := record.getMessage())]
    assert len(messages) == warnings
    assert all("takes bfloat16, float16, not float32" in message for message in messages)


@pytest.mark.usefixtures("_through")
def test_older_cann_takes_index_lists(only: Callable[..., None]) -> None:
    only("mindiesd", cann=(8, 5))
    with served_wan("rain_fusion_attn", torch.bfloat16, sparsity=0.5, min_tokens=0) as forward:
        assert forward().count("mindiesd.rainfusionattention") == 2


@pytest.mark.usefixtures("_through")
@pytest.mark.parametrize("package", ["attentions", "sgl_kernel_npu"])
def test_block_sparse_asks_the_estimator_of_the_package(package: str, only: Callable[..., None]) -> None:
    """Not mindiesd's: in 3.1.0 its shape function divides where it must round, and fails for every call."""
    only(package)
    namespace = "npu" if package == "sgl_kernel_npu" else package
    with served_wan("block_sparse_attn", torch.bfloat16, sparsity=0.5, min_tokens=0) as forward:
        assert forward().count(f"{namespace}.sparse_block_estimate") == 2


@pytest.mark.usefixtures("_through")
def test_fa_reaches_the_fused_operator(only: Callable[..., None]) -> None:
    only()
    with served_wan("fa", torch.bfloat16) as forward:
        assert forward().count("npu.npu_fused_infer_attention_score") == 2


@pytest.mark.usefixtures("_through")
def test_laser_reaches_the_operator_of_mindiesd(only: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    only("mindiesd")
    monkeypatch.setattr("ditattn.backends.laser_attn.MIN_LASER_TOKENS", 1)
    with served_wan("laser_attn", torch.bfloat16) as forward:
        assert forward().count("mindiesd.la") == 2


@pytest.mark.usefixtures("_through")
def test_torch_sdpa_reaches_torch_npus_fused_kernel(only: Callable[..., None]) -> None:
    only()
    with served_wan("torch_sdpa", torch.bfloat16) as forward:
        assert any(name.startswith("npu.npu_fusion_attention") for name in forward())


@pytest.mark.parametrize("backend", ["torch_sdpa", "fa", "laser_attn", "block_sparse_attn", "rain_fusion_attn"])
def test_every_backend_as_one_operation(backend: str, only: Callable[..., None]) -> None:
    """As compiled graphs see it: nothing of ours but the opaque operation."""
    only("mindiesd")
    config = {"sparsity": 0.5, "min_tokens": 0} if backend.endswith(("sparse_attn", "fusion_attn")) else {}
    with served_wan(backend, torch.bfloat16, **config) as forward:
        ours = {name for name in forward() if name.startswith("ditattn.")}
    assert ours == {"ditattn.attend"}


def test_no_token_is_read_on_the_host(only: Callable[..., None]) -> None:
    """Fake tensors have no values: an operand that needed one would have failed above. Head sizes that are padded included."""
    assert HEAD_SIZE not in (64, 128)
    only()
    with FakeTensorMode(), torch.device("npu"):
        q = torch.empty(2, 300, 4, HEAD_SIZE, dtype=torch.bfloat16)
        plan = ditattn.BlockPlan.from_mask(torch.ones(2, 4, 3, 3, dtype=torch.bool), 300, 300)
        out, _ = ascend.MASK_TORCH_NPU.run(SparseCall(q, q, q, plan, 0.1))
    assert out.shape == q.shape
    assert {name.lower() for name in BLOCK_SPARSE} <= {row.name for row in TABLE}


@pytest.mark.usefixtures("_through")
def test_the_report_names_what_served_and_not_what_the_backend_would_rather_have(only: Callable[..., None]) -> None:
    """The tokens of this model are too few for Laser, whatever is installed."""
    only("mindiesd")
    with served_wan("laser_attn", torch.bfloat16) as forward:
        assert "mindiesd.la" not in forward()
        (component,) = forward.report().components.values()
    assert component.implementations == {"dense_attention": "torch"}
