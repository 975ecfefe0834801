"""The steps around Ascend's dense operators, on the CPU, against a stand-in with the Laser operator's documented semantics."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import ascend_operators
import judge
import oracle
from ditattn.errors import BackendUnavailable
from ditattn.ops.calls import DenseCall
from ditattn.ops.dense_attention import ascend, dense_attention


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def laser_operator(inputs: ascend.LaserInputs) -> Tensor:
    q, k, v, scale, pre_tokens = inputs
    return ascend_operators.laser(q, k, v, scale_value=scale, head_num=q.shape[1], pre_tokens=pre_tokens)[1]


def run(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return ascend._la_postprocess_output(laser_operator(ascend._la_preprocess_input(DenseCall(query, key, value, scale))), query)


# what is padded depends on the rest that 256 leaves
@pytest.mark.parametrize(
    ("length", "dim"), [*itertools.product([256, 257, 319, 320, 448, 511, 512], [32, 64, 72, 96, 128]), (2048, 64), (2111, 72)]
)
def test_any_length_and_head_size(length: int, dim: int) -> None:
    q, k, v = (draw(1, length, 1, dim, seed=i) for i in range(3))
    out = run(q, k, v, dim**-0.5)
    assert out.shape == q.shape
    assert out.dtype == torch.float16
    assert judge.relative_error(out, oracle.attention(q, k, v)[0]) < 4e-3


@pytest.mark.parametrize("length", [256, 300])
def test_padding_is_announced_and_only_then(length: int) -> None:
    inputs = ascend._la_preprocess_input(DenseCall(*(draw(1, length, 1, 64, seed=i) for i in range(3)), 0.125))
    assert inputs.pre_tokens == (ascend.LASER_NO_PADDING if length == 256 else 512 - 300)


def test_padded_keys_do_not_dilute_strongly_negative_rows() -> None:
    """With zero-padded keys left in, their score 0 would win against real scores below -100."""
    q, k, v = draw(1, 2100, 1, 64).abs() + 2, -4 * (draw(1, 2100, 1, 64, seed=1).abs() + 2), draw(1, 2100, 1, 64, seed=2)
    assert judge.relative_error(run(q, k, v, 0.125), oracle.attention(q, k, v)[0]) < 5e-2


def test_bf16_beyond_the_range_of_fp16() -> None:
    """Raw scores above 65504 and values above fp16's largest number: without the scaling both overflow."""
    q, k = (60 * draw(1, 2048, 1, 128, seed=i, dtype=torch.bfloat16) for i in range(2))
    v = 2e5 * draw(1, 2048, 1, 128, seed=2, dtype=torch.bfloat16)
    exact = oracle.attention(q, k, v, scale=1e-4)[0]
    assert float((q[0, :, 0].double() @ k[0, :, 0].double().T).abs().max()) > 65504
    out = run(q, k, v, 1e-4)
    assert out.dtype == torch.bfloat16
    assert judge.relative_error(out, exact) < 1e-2
    naive = laser_operator(ascend.LaserInputs(*(x.transpose(1, 2).contiguous().to(torch.float16) for x in (q, k, v)), 1e-4, 2**31 - 1))
    assert not bool(naive.isfinite().all())


def test_scaling_of_bf16_is_exact() -> None:
    """A power of two: down to 2^-9 every bf16 number survives bit for bit; smaller ones are rounded by at most 2^-17."""
    x = draw(1, 2048, 1, 64, dtype=torch.bfloat16)
    inputs = ascend._la_preprocess_input(DenseCall(x, x, x, 0.125))
    back, there = inputs.query[0, 0, :, :64].float() * 256, x[0, :, 0].float()
    large = there.abs() >= 2**-9
    assert torch.equal(back[large], there[large])
    assert 0 < float((back - there).abs().max()) <= 2**-17
    assert inputs.scale == 0.125 * 256 * 256


def test_grouped_heads() -> None:
    q, k, v = (draw(2, 560, heads, 64, seed=i) for i, heads in enumerate((4, 2, 2)))
    assert judge.relative_error(run(q, k, v, 0.125), oracle.attention(q, k, v)[0]) < 4e-3


def test_by_name_on_another_device_is_an_error() -> None:
    q = draw(1, 2048, 1, 64)
    with pytest.raises(BackendUnavailable, match="runs on npu, not on cpu"):
        dense_attention(q, q, q, implementation="laser_mindiesd")
