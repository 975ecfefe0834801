"""Every Ascend implementation through its package's own signature, on the CPU, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import judge
from ascend_calls import BLOCK_SPARSE, CASES, LASER, LASER_CASES, check_laser, laser_of, pairs, run, run_ordered
from cases import Case, build


@pytest.mark.parametrize(("name", "case"), pairs(BLOCK_SPARSE))
def test_block_sparse(name: str, case: Case) -> None:
    problem = build(case, torch.bfloat16)
    judge.check_output(run(name, problem)[0], problem)


@pytest.mark.parametrize(("name", "case"), pairs(BLOCK_SPARSE, equal_lengths=True))
def test_block_sparse_in_another_order(name: str, case: Case) -> None:
    problem = build(case, torch.bfloat16)
    judge.check_output(run_ordered(name, problem, "tokens first")[0], problem)


@pytest.mark.parametrize("name", ["MASK_TORCH_NPU", "MASK_MINDIESD"])
@pytest.mark.parametrize("soc_name", ["Ascend910_9382", "Ascend950PR_9579"])
def test_log_sum_exp_on_every_generation(name: str, soc_name: str, soc: Callable[[str], None]) -> None:
    soc(soc_name)
    for case in (CASES[1], CASES[9]):
        problem = build(case, torch.float16)
        out, lse = run(name, problem, return_lse=True)
        judge.check_output(out, problem)
        judge.check_lse(lse, problem)


@pytest.mark.parametrize("name", LASER)
@pytest.mark.parametrize("case", LASER_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_laser(name: str, case: Case, dtype: torch.dtype) -> None:
    problem = build(case, dtype)
    check_laser(laser_of(name, problem), problem)


@pytest.mark.parametrize("name", LASER)
def test_laser_keeps_bf16_in_range(name: str) -> None:
    """Unscaled scores above fp16's largest number, on every package's path."""
    problem = build(Case("far", query_length=300, key_length=300, dim=128, data="random", scale=1e-4), torch.bfloat16)
    problem.query.mul_(60)
    problem.key.mul_(60)
    problem.value.mul_(2e5)
    scores = torch.einsum("bshd,bthd->bhst", problem.query.double(), problem.key.double())
    assert scores.abs().max() > 65504
    assert judge.relative_error(laser_of(name, problem), judge.exact_result(problem)[0]) < 1e-2
