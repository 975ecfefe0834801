"""Checks of the compiled CPU kernels for one instruction set or for several in one process, by force:

DITATTN_CPU_ISA=avx2 python tests/cpu_checks.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch

import judge
from cases import SPARSE_CASES, TAIL_CASES, Case, build
from ditattn.ops import cpu_library
from ditattn.ops.block_mean import block_mean
from ditattn.ops.block_sparse_attention import block_sparse_attention
from ditattn.ops.dense_attention import dense_attention
from ditattn.ops.table import PADDED_HEAD_DIMS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def forced(variant: str) -> Iterator[None]:
    """The kernels of that instruction set serve this process, as `DITATTN_CPU_ISA` chooses them for a new one."""
    library = cpu_library._load(variant)
    assert isinstance(library, cpu_library.Library), library
    with patch.object(cpu_library, "selection", lambda: cpu_library.Selection(library, None, {})):
        yield


def check_case(case: Case, dtype: torch.dtype, variants: Sequence[str] = ()) -> None:
    """For each of the variants, or for the chosen one; what is exact is computed once."""
    problem = build(case, dtype)
    for variant in variants or [cpu_library.selection().sentence()]:
        with forced(variant):
            tensors = (problem.query, problem.key, problem.value)
            if problem.plan is None:
                out = dense_attention(*tensors, **problem.options, implementation="cpu")
            else:
                out = block_sparse_attention(*tensors, problem.plan, tail=problem.tail, **problem.options, implementation="cpu")
        try:
            judge.check_output(out, problem)
        except AssertionError as error:
            raise AssertionError(f"{variant}, {case}, {dtype}: {error}") from error


def check_cases(variants: Sequence[str] = ()) -> int:
    """Every case of the op that the kernel takes, each in one dtype in turn (the contract tests take all for the chosen variant)."""
    cases = [case for case in (*SPARSE_CASES, *TAIL_CASES) if case.dim in PADDED_HEAD_DIMS and case.block_size == 128]
    for number, case in enumerate(cases):
        check_case(case, DTYPES[number % len(DTYPES)], variants)
    return len(cases)


def check_tails(variants: Sequence[str] = ()) -> None:
    """Every length of a short last block, of queries and of keys, with logits whose padding would be noticed."""
    for length in range(1, 130):
        data = "negative logits" if length % 2 else "random"
        short = Case("tail", query_length=length, key_length=130 - length, heads=1, key_heads=1, dim=32, data=data)
        check_case(short, torch.float32, variants)
        check_case(Case("tail", query_length=130 - length, key_length=length, heads=1, key_heads=1, data=data), torch.bfloat16, variants)


def check_fp16() -> int:
    """Every fp16 number is widened as torch does it; what lies a quarter of the way to a neighbour is rounded to the nearer one."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    halves = bits.view(torch.float16).view(1, -1, 1, 64)
    wide = block_mean(halves, 1, implementation="cpu")
    assert torch.equal(wide.nan_to_num(nan=7.0), halves.float().nan_to_num(nan=7.0))
    finite = halves.flatten()[halves.flatten().isfinite()].sort().values
    near, far = (x.flatten() for x in torch.stack([finite[:-1], finite[1:]])[:, : len(finite) // 64 * 64 - 64])
    for first, second in ((near, far), (far, near)):
        # four keys with equal scores: the result is the mean of their values
        value = torch.stack([first, first, first, second]).unflatten(1, (-1, 64)).transpose(0, 1).unsqueeze(2).contiguous()
        out = dense_attention(torch.zeros_like(value[:, :1]), torch.zeros_like(value), value, implementation="cpu")
        assert torch.equal(out.flatten(), first)
    return halves.numel() + 2 * near.numel()


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1:] == ["fp16"]:
        print(f"{cpu_library.selection().sentence()}: {check_fp16()} fp16 numbers")
        sys.exit()
    check_tails()
    print(f"{cpu_library.selection().sentence()}: {check_cases()} cases passed")
