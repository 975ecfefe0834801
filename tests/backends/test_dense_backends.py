"""torch_sdpa, fa and laser_attn: exact, and honest about which kernel they take."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import judge
import oracle
from ditattn.backends.base import AttentionBackend, AttentionMetadata, CallRecord
from ditattn.backends.fa import FABackend
from ditattn.backends.laser_attn import MIN_LASER_TOKENS, LaserAttentionBackend, LaserAttentionImpl
from ditattn.backends.torch_sdpa import TorchSDPABackend
from ditattn.errors import UnsupportedCall, UnsupportedHeadSize
from ditattn.ops.dense_attention import LASER_NAMES
from sparse_calls import SPARSE_BACKENDS, call, draw

DENSE_BACKENDS: list[type[AttentionBackend]] = [TorchSDPABackend, FABackend, LaserAttentionBackend]
backends = pytest.mark.parametrize("backend", DENSE_BACKENDS, ids=lambda b: b.name)


@backends
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact(backend: type[AttentionBackend], causal: bool, dtype: torch.dtype) -> None:
    q, k, v = (draw(2, 333, heads, 64, seed=i, dtype=dtype) for i, heads in enumerate((4, 2, 2)))
    records: list[CallRecord] = []
    impl = backend.get_impl_cls()(4, 64, None, causal, 2, observer=records.append)
    out = impl.forward(q, k, v, AttentionMetadata())
    assert out.dtype == dtype
    assert judge.relative_error(out, oracle.attention(q, k, v, causal=causal)[0]) < max(2 * torch.finfo(dtype).eps, 2e-6)
    assert [record.plan for record in records] == [None]


@pytest.mark.parametrize("backend", [TorchSDPABackend, LaserAttentionBackend], ids=lambda b: b.name)
def test_key_lengths(backend: type[AttentionBackend]) -> None:
    q, k, v = (draw(2, 200, 2, 64, seed=i) for i in range(3))
    lengths = torch.tensor([77, 200])
    out = backend.get_impl_cls()(2, 64).forward(q, k, v, AttentionMetadata(key_lengths=lengths))
    assert judge.relative_error(out, oracle.attention(q, k, v, key_lengths=lengths)[0]) < 2e-6


def test_fa_does_not_fall_back() -> None:
    """A call FlashAttention cannot serve is an error that says what would work."""
    q = draw(2, 200, 2, 64)
    with pytest.raises(UnsupportedCall, match=r"'flash' was asked for .*does not honour key_lengths\. Possible here: .*torch"):
        FABackend.get_impl_cls()(2, 64).forward(q, q, q, AttentionMetadata(key_lengths=torch.tensor([1, 2])))


def test_laser_head_sizes() -> None:
    with pytest.raises(UnsupportedHeadSize, match=r"8, 16, \.\.\. 128, not 136"):
        LaserAttentionImpl(2, 136)


def on_npu(length: int) -> SimpleNamespace:
    """As much of an NPU tensor as the choice looks at."""
    return SimpleNamespace(device=SimpleNamespace(type="npu"), shape=(1, length, 4, 64))


@pytest.mark.parametrize(
    ("query", "key", "causal", "lengths", "expected"),
    [
        (4096, 4096, False, None, (LASER_NAMES, "dense backend")),
        (MIN_LASER_TOKENS, MIN_LASER_TOKENS, False, None, (LASER_NAMES, "dense backend")),
        (MIN_LASER_TOKENS - 1, 4096, False, None, (("torch",), "SDPA: fewer than 2048 tokens")),
        (4096, 512, False, None, (("torch",), "SDPA: query and key lengths differ")),
        (4096, 4096, True, None, (("torch",), "SDPA: the operator takes no mask")),
        (4096, 4096, False, torch.tensor([4000]), (("torch",), "SDPA: the operator takes no mask")),
    ],
)
def test_which_calls_reach_the_ascend_operator(
    query: int, key: int, causal: bool, lengths: torch.Tensor | None, expected: tuple[tuple[str, ...], str]
) -> None:
    """The operator is wrong on short sequences, takes equal lengths only and ignores masks: those calls go to SDPA, with the reason."""
    impl = LaserAttentionImpl(4, 64, causal=causal)
    assert impl.choose(on_npu(query), on_npu(key), AttentionMetadata(key_lengths=lengths)) == expected


@pytest.mark.parametrize("backend", SPARSE_BACKENDS, ids=lambda b: b.name)
def test_dense_steps_run_the_dense_backend_bit_for_bit(backend: type[AttentionBackend]) -> None:
    """Another kernel in the warm-up steps would move every later step away from the dense baseline."""
    q, k, v = (draw(1, 768, 2, 64, seed=i, dtype=torch.bfloat16) for i in range(3))
    out, record = call(backend, q, k, v, (3, 16, 16), current_timestep=0)
    assert record.reason == "first steps"
    assert torch.equal(out, LaserAttentionImpl(2, 64).forward(q, k, v, AttentionMetadata()))
