"""Cases for the Ascend implementations, and a way to run one of them past the op's own checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import ascend_operators
import judge
from cases import Case, Problem
from ditattn.ops.ascend import Operator
from ditattn.ops.block_sparse_attention import TABLE, ascend
from ditattn.ops.calls import DenseCall, SparseCall
from ditattn.ops.dense_attention import LASER_NAMES
from ditattn.ops.dense_attention import ascend as dense_ascend

LASER = tuple(name.upper() for name in LASER_NAMES)
LASER_CASES = (
    Case("batch of 2, length 300", batch=2, layout="transposed"),
    Case("grouped heads 8 to 2, length 513", heads=8, key_heads=2, query_length=513, key_length=513),
    Case("head size 32, length 256", dim=32, query_length=256, key_length=256),
    Case("head size 96, 64 columns of padding", dim=96, query_length=448, key_length=448),
    Case("head size 128, 192 columns of padding", dim=128, query_length=320, key_length=320),
    Case("negative logits", data="negative logits", query_length=300, key_length=300),
)
BLOCK_SPARSE = (
    "MASK_TORCH_NPU",
    "MASK_MINDIESD",
    "INDEX_ATTENTIONS",
    "INDEX_MINDIESD",
    "COUNTED_SGL_KERNEL_NPU",
    "COUNTED_ATTENTIONS",
    "COUNTED_MINDIESD",
)

CASES = (
    Case("batch of 2, lengths between blocks", batch=2, query_length=700, key_length=700, plan="random", layout="transposed"),
    Case("grouped heads 8 to 2, batch of 2", batch=2, heads=8, key_heads=2, query_length=517, key_length=517, plan="random"),
    Case("head size 32", dim=32, query_length=390, key_length=517, plan="random"),
    Case("head size 72", dim=72, query_length=390, key_length=517, plan="uneven"),
    Case("head size 88", dim=88, query_length=390, key_length=300, plan="random"),
    Case("head size 96", dim=96, query_length=517, key_length=390, plan="random", layout="odd strides"),
    Case("head size 128, large logits", dim=128, query_length=517, key_length=517, plan="random", data="large logits"),
    Case("negative logits, short last block", query_length=517, key_length=517, plan="last block", data="negative logits"),
    Case("rows without a block", batch=2, query_length=517, key_length=517, plan="uneven"),
    Case("more than 32 blocks", heads=1, key_heads=1, query_length=130, key_length=33 * 128 + 5, plan="random", scale=0.2),
    Case("plan shared by batch and heads", batch=2, query_length=517, key_length=517, plan="uneven", plan_batch=1, plan_heads=1),
    Case("key lengths", batch=3, query_length=517, key_length=517, plan="uneven", key_lengths=(517, 129, 0)),
    Case("key lengths, negative logits", batch=2, key_length=300, plan="full", key_lengths=(65, 290), data="negative logits"),
)


def pairs(names: Iterable[str], *, equal_lengths: bool = False) -> list[Any]:
    """Every case that the implementations take, one after the other, as pytest parameters (name, case).

    Args:
        equal_lengths: only those with as many queries as keys.
    """
    rows = {row.name.upper(): row for row in TABLE}
    return [
        pytest.param(name, case, id=f"{name.lower()}-{case}")
        for case in CASES
        for name in names
        if (case.key_lengths is None or "key_lengths" in rows[name].honours) and (not equal_lengths or case.query_length == case.key_length)
    ]


def stand_in_operators(monkeypatch: pytest.MonkeyPatch, generation: str) -> None:
    """The documented semantics in place of every operator, on an SoC of `generation`, whatever is installed."""
    kernels = {ascend.Masked: partial(ascend_operators.masked, generation), ascend.Indexed: ascend_operators.indexed}
    kernels[ascend.Counted] = ascend_operators.counted
    operators = {getattr(ascend, name).operator: kernels[type(getattr(ascend, name))] for name in BLOCK_SPARSE}
    operators |= {getattr(dense_ascend, name).operator: ascend_operators.laser for name in LASER}
    monkeypatch.setattr(Operator, "load", lambda self: operators[self])
    monkeypatch.setattr(ascend, "soc_generation", lambda: generation)


def run(name: str, problem: Problem, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """One implementation on tensors of any device, as the op would call it."""
    q, k, v = problem.query, problem.key, problem.value
    call = SparseCall(q, k, v, problem.plan, scale_of(problem), key_lengths=problem.key_lengths, return_lse=return_lse)
    out, lse = getattr(ascend, name).run(call)
    return out.contiguous(), lse


def scale_of(problem: Problem) -> float:
    """The factor on the scores that the op would hand on."""
    return problem.query.shape[3] ** -0.5 if problem.scale is None else problem.scale


STORED: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens first": Tensor.contiguous,
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "with gaps": lambda x: torch.nn.functional.pad(x, (0, 3, 1, 0), value=torch.nan)[:, :, 1:, : x.shape[3]],
}


def run_ordered(name: str, problem: Problem, stored: str, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """As `run`, on tensors whose tokens stand in another order than the problem's; the result is brought back into the problem's."""
    order = torch.randperm(problem.query.shape[1], generator=torch.Generator().manual_seed(3))
    inverse = order.argsort()
    q, k, v = (STORED[stored](x[:, inverse]) for x in (problem.query, problem.key, problem.value))
    call = SparseCall(q, k, v, problem.plan, scale_of(problem), False, problem.key_lengths, return_lse, order, inverse)
    out, lse = getattr(ascend, name).run(call)
    return out[:, order], None if lse is None else lse[:, :, order]


def laser_of(name: str, problem: Problem) -> Tensor:
    """One package's Laser on tensors of any device, as the op would call it."""
    return getattr(dense_ascend, name).run(DenseCall(problem.query, problem.key, problem.value, scale_of(problem)))


def check_laser(out: Tensor, problem: Problem) -> None:
    """Laser rounds the unscaled scores to fp16: the largest one's rounding, scaled, is an error of its own beside torch's."""
    exact = judge.exact_result(problem)[0]
    assert out.shape == problem.query.shape
    assert out.dtype == problem.query.dtype
    scale = scale_of(problem)
    keys = problem.key.float().repeat_interleave(problem.query.shape[2] // problem.key.shape[2], dim=2)
    largest = torch.einsum("bshd,bthd->bhst", problem.query.float(), keys).abs().max().item()
    allowed = judge.FACTOR * judge.relative_error(judge.torch_result(problem), exact) + 2**-11 * max(1.0, largest * abs(scale))
    error = judge.relative_error(out, exact)
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"
