"""Block-sparse attention through FlexAttention, on a few cases: every new kind of call costs a compilation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import judge
from cases import DEVICES, Case, build
from ditattn.errors import UnsupportedCall
from ditattn.ops.block_sparse_attention import TABLE, block_sparse_attention, flex
from ditattn.ops.table import CallFacts
from ditattn.plan.block_plan import BlockPlan
from sparse_calls import draw

# one shape and one dtype, so that they share a compiled kernel
CASES = (
    Case("uneven", plan="uneven", heads=4, query_length=390, key_length=517),
    Case("empty", plan="empty", heads=4, query_length=390, key_length=517),
    Case("full", plan="full", heads=4, query_length=390, key_length=517, data="shifted"),
)
NARROW = Case("trimmed", plan="first block", heads=4, query_length=390, key_length=517)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_error_is_in_proportion_to_torch(device: str) -> None:
    row = next(row for row in TABLE if row.name == "flex" and row.runs_on(device))
    if reason := row.refusal(CallFacts(device, torch.bfloat16, 64)):
        pytest.skip(reason)
    for case in (*CASES, NARROW):
        problem = build(case, torch.bfloat16, device)
        if case is NARROW:
            problem = replace(problem, plan=problem.plan.trimmed())
        out = block_sparse_attention(problem.query, problem.key, problem.value, problem.plan, **problem.options, implementation="flex")
        judge.check_output(out, problem)


def test_a_trimmed_plan_keeps_its_number_of_key_blocks() -> None:
    """The width of the lists is what torch's code for the CPU takes for it."""
    plan = build(NARROW, torch.bfloat16).plan.trimmed()
    assert plan.indices.shape[-1] == 1
    mask = flex.block_mask(plan)
    assert mask.full_kv_indices.shape[-1] == mask.kv_indices.shape[-1] == plan.num_key_blocks == 5
    assert mask.shape[-2:] == (390, 517)


def test_it_runs_only_when_asked_for() -> None:
    assert not any(row.automatic for row in TABLE if row.name == "flex")


def test_options_it_cannot_honour_are_refused() -> None:
    query = draw(1, 130, 1, 32)
    with pytest.raises(UnsupportedCall, match="does not honour causal"):
        block_sparse_attention(query, query, query, BlockPlan.full(130, 130), causal=True, implementation="flex")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "compiler-that-nobody-has")
    assert "found none of compiler-that-nobody-has" in (flex.why_not_compiled() or "")
