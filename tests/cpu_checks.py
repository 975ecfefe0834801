"""Checks of the compiled CPU kernels that also run in a child process, so that each instruction set can be forced:

DITATTN_CPU_ISA=avx2 python tests/cpu_checks.py
"""

from __future__ import annotations

import sys

import torch

import judge
from cases import SPARSE_CASES, TAIL_CASES, Case, build
from ditattn.ops import cpu_library
from ditattn.ops.block_mean import block_mean
from ditattn.ops.block_sparse_attention import block_sparse_attention
from ditattn.ops.dense_attention import dense_attention
from ditattn.ops.table import PADDED_HEAD_DIMS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_case(case: Case, dtype: torch.dtype) -> None:
    problem = build(case, dtype)
    tensors = (problem.query, problem.key, problem.value)
    if problem.plan is None:
        judge.check_output(dense_attention(*tensors, **problem.options, implementation="cpu"), problem)
    else:
        out = block_sparse_attention(*tensors, problem.plan, tail=problem.tail, **problem.options, implementation="cpu")
        judge.check_output(out, problem)


def check_cases() -> int:
    """Every case of the op that the kernel takes, each in one dtype in turn (the contract tests take all for the chosen variant)."""
    cases = [case for case in (*SPARSE_CASES, *TAIL_CASES) if case.dim in PADDED_HEAD_DIMS and case.block_size == 128]
    for number, case in enumerate(cases):
        check_case(case, DTYPES[number % len(DTYPES)])
    return len(cases)


def check_tails() -> None:
    """Every length of a short last block, of queries and of keys, with logits whose padding would be noticed."""
    for length in range(1, 130):
        data = "negative logits" if length % 2 else "random"
        check_case(Case("tail", query_length=length, key_length=130 - length, heads=1, key_heads=1, dim=32, data=data), torch.float32)
        check_case(Case("tail", query_length=130 - length, key_length=length, heads=1, key_heads=1, data=data), torch.bfloat16)


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
