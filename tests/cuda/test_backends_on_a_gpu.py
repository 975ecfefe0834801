"""The sparse backends on an NVIDIA GPU: the CPU's results, nothing that waits for the device, and calls that a CUDA graph can hold."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ditattn.backends.base import AttentionImpl, AttentionMetadata, CallRecord
from ditattn.backends.registry import AttentionBackendEnum, load_backend
from ditattn.ops.dense_attention import dense_attention
from ditattn.plan.reuse import ForwardId
from sparse_calls import draw

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")

GRID, TEXT, HEADS = (5, 16, 24), 70, 4
SPARSE = ("permuted_sparse_attn", "rain_fusion_attn", "block_sparse_attn")
NUM_STEPS = 40


def layer(name: str, dim: int) -> tuple[AttentionImpl, list[CallRecord]]:
    records: list[CallRecord] = []
    impl = load_backend(AttentionBackendEnum(name)).get_impl_cls()(HEADS, dim, layer_index=0, observer=records.append)
    return impl, records


def metadata_of(name: str, step: int) -> AttentionMetadata:
    return (
        load_backend(AttentionBackendEnum(name))
        .get_builder_cls()()
        .build(
            current_timestep=step,
            num_steps=NUM_STEPS,
            skip_first_steps=2,
            raw_latent_shape=(1, 4, *GRID),
            patch_size=1,
            sparsity=0.6,
            num_suffix_tokens=TEXT,
            forward_id=ForwardId(run=1),
        )
    )


def tensors(dim: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v whose neighbours resemble each other, so that blocks differ in what they weigh."""
    length = GRID[0] * GRID[1] * GRID[2] + TEXT
    rough = [draw(1, length // 10 + 1, HEADS, dim, seed=seed + i).repeat_interleave(10, 1)[:, :length] for i in range(3)]
    return [(x + 0.3 * draw(*x.shape, seed=seed + 7)).to(dtype) for x in rough]


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SPARSE)
def test_steps_are_as_good_as_those_of_the_cpu(name: str, dtype: torch.dtype, dim: int) -> None:
    """The last dense step, sparse ones, and with permuted_sparse_attn dense ones among them: as near to dense attention as on the CPU."""
    (ours, on_gpu), (theirs, on_cpu) = layer(name, dim), layer(name, dim)
    for step in range(1, 12):
        drawn = tensors(dim, dtype, seed=step // 3)
        out = ours.forward(*(x.cuda() for x in drawn), metadata_of(name, step))
        expected = theirs.forward(*(x.float() for x in drawn), metadata_of(name, step))
        assert out.device.type == "cuda"
        assert out.dtype == dtype
        assert on_gpu[-1].reason == on_cpu[-1].reason
        if on_cpu[-1].plan is not None:
            same = on_gpu[-1].plan.to_mask().cpu() == on_cpu[-1].plan.to_mask()
            # blocks of nearly equal cost may change places
            assert same.float().mean() > 0.97, step
        exact = dense_attention(*(x.float() for x in drawn), implementation="torch")
        error, allowed = (((x.cpu().float() - exact).norm() / exact.norm()).item() for x in (out, expected))
        assert error < 1.1 * allowed + (1e-4 if dtype == torch.float32 else 1e-2), step


@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_step_does_not_wait_for_the_gpu(name: str) -> None:
    impl, records = layer(name, 128)
    drawn = [x.cuda() for x in tensors(128, torch.bfloat16)]
    for step in range(1, 4):
        impl.forward(*drawn, metadata_of(name, step))
    assert records[-1].plan is not None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        impl.forward(*drawn, metadata_of(name, 3))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", SPARSE)
def test_a_cuda_graph_holds_a_sparse_step(name: str) -> None:
    impl, _ = layer(name, 128)
    drawn = [x.cuda() for x in tensors(128, torch.bfloat16)]
    for step in range(1, 4):
        impl.forward(*drawn, metadata_of(name, step))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        impl.forward(*drawn, metadata_of(name, 3))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = impl.forward(*drawn, metadata_of(name, 3))
    for x, other in zip(drawn, tensors(128, torch.bfloat16, seed=9), strict=True):
        x.copy_(other)
    graph.replay()
    torch.testing.assert_close(captured, impl.forward(*drawn, metadata_of(name, 3)))
