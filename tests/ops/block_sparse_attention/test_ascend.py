"""The steps around Ascend's block-sparse operators, on the CPU, against stand-ins with the operators' documented semantics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import judge
from ascend_calls import CASES, pairs, run, stand_in_operators
from cases import Case, build
from ditattn.attention.plan import BlockPlan
from ditattn.errors import BackendUnavailable
from ditattn.ops.block_sparse_attention import TABLE, block_sparse_attention
from ditattn.ops.block_sparse_attention.ascend_operands import counted_inputs, index_inputs, mask_inputs
from ditattn.ops.table import CallFacts


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Stand-ins in place of the operators, on an SoC of the generation."""

    def place(generation: str) -> None:
        stand_in_operators(monkeypatch, generation)

    return place


@pytest.mark.parametrize(("name", "case"), pairs(["MASK_TORCH_NPU", "INDEX_ATTENTIONS", "COUNTED_ATTENTIONS"]))
def test_error_is_in_proportion_to_torch(name: str, case: Case, operators: Callable[[str], None]) -> None:
    operators("A2")
    problem = build(case, torch.bfloat16)
    judge.check_output(run(name, problem)[0], problem)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_log_sum_exp(case: Case, operators: Callable[[str], None]) -> None:
    operators("A3")
    problem = build(case, torch.float16)
    out, lse = run("MASK_MINDIESD", problem, return_lse=True)
    judge.check_output(out, problem)
    judge.check_lse(lse, problem)


def test_a5_takes_its_own_softmax_mode(operators: Callable[[str], None]) -> None:
    operators("A5")
    problem = build(CASES[0], torch.float16)
    judge.check_output(run("MASK_TORCH_NPU", problem)[0], problem)


def test_masks_and_lists_need_no_host_synchronisation() -> None:
    """Shapes alone decide the operands: they can be made from meta tensors, which have no values to wait for."""
    problem = build(CASES[0], torch.bfloat16)
    q, k, v = (x.to("meta") for x in (problem.query, problem.key, problem.value))
    plan = BlockPlan(problem.plan.indices.to("meta"), problem.plan.counts.to("meta"), q.shape[1], k.shape[1])
    for inputs in (mask_inputs, index_inputs, counted_inputs):
        assert inputs(q, k, v, plan).query.device.type == "meta"


def _layout_changes(function: Callable[..., Any], *tensors: Tensor) -> int:
    """Copies of tensors as large as the first one that the function makes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.numel() >= tensors[0].numel() and func.overloadpacket.__name__ in ("clone", "copy_"):
                self.number += 1
            return result

    with Count() as counted:
        function(*tensors)
    return counted.number


def test_copies_are_counted() -> None:
    """Contiguous head sizes 64 and 128: none for masks and lists; one per tensor, the transposition, for counts."""
    q, k, v = (torch.randn(2, 512, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    plan = BlockPlan.full(512, 512)
    assert _layout_changes(lambda *x: mask_inputs(*x, plan), q, k, v) == 0
    assert _layout_changes(lambda *x: index_inputs(*x, plan), q, k, v) == 0
    assert _layout_changes(lambda *x: counted_inputs(*x, plan), q, k, v) == 3


@pytest.mark.parametrize("name", ["mask_torch_npu", "index_attentions", "counted_sgl_kernel_npu"])
def test_refusals_name_the_limit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(row for row in TABLE if row.name == name)
    assert row.mismatch(CallFacts("npu", torch.bfloat16, 64, frozenset({"other_block_size"}))) == "does not honour other_block_size"
    odd = row.mismatch(CallFacts("npu", torch.bfloat16, 64, frozenset({"gqa"}), group=3))
    assert odd == (None if name.startswith("counted") else "takes 1, 2, 4, ... 64 query heads per key head, not 3")
    assert row.mismatch(CallFacts("npu", torch.float32, 64)) == "takes bfloat16, float16, not float32"
    assert row.mismatch(CallFacts("npu", torch.bfloat16, 80)) == "takes head sizes 32, 64, 96, 128, not 80"
    assert row.mismatch(CallFacts("npu", torch.bfloat16, 64, frozenset({"causal"}))) == "does not honour causal"


def test_by_name_on_another_device_is_an_error() -> None:
    problem = build(CASES[0], torch.bfloat16)
    with pytest.raises(BackendUnavailable, match="runs on npu, not on cpu"):
        block_sparse_attention(problem.query, problem.key, problem.value, problem.plan, implementation="mask_torch_npu")
