"""The steps around Ascend's block-sparse operators, on the CPU, against stand-ins with the operators' documented semantics."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import judge
from ascend_calls import BLOCK_SPARSE, CASES, STORED, pairs, run, run_ordered, stand_in_operators
from cases import Case, build, shared
from ditattn.errors import BackendUnavailable
from ditattn.ops.ascend import Operator
from ditattn.ops.block_sparse_attention import TABLE, ascend, ascend_layout, block_sparse_attention, compute
from ditattn.ops.block_sparse_attention.ascend_operands import counted_inputs, index_inputs, mask_inputs
from ditattn.ops.calls import SparseCall
from ditattn.ops.table import CallFacts, Implementation
from ditattn.plan.block_plan import BlockPlan
from ditattn.plan.token_order import TokenOrder


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Stand-ins in place of the operators, on an SoC of the generation."""

    def place(generation: str) -> None:
        stand_in_operators(monkeypatch, generation)

    return place


@pytest.mark.parametrize(("name", "case"), pairs(["MASK_TORCH_NPU", "INDEX_ATTENTIONS", "COUNTED_ATTENTIONS"]))
def test_error_is_in_proportion_to_torch(name: str, case: Case, operators: Callable[[str], None]) -> None:
    operators("A2")
    problem = shared(case, torch.bfloat16)
    judge.check_output(run(name, problem)[0], problem)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_log_sum_exp(case: Case, operators: Callable[[str], None]) -> None:
    operators("A3")
    problem = shared(case, torch.float16)
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
        assert inputs(SparseCall(q, k, v, plan, 0.1)).query.device.type == "meta"


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("name", "case"), pairs(BLOCK_SPARSE, equal_lengths=True))
def test_an_order_is_applied_and_undone(name: str, case: Case, stored: str, operators: Callable[[str], None]) -> None:
    operators("A2")
    problem = shared(case, torch.bfloat16)
    judge.check_output(run_ordered(name, problem, stored)[0], problem)


@pytest.mark.parametrize("case", [case for case in CASES if case.query_length == case.key_length], ids=str)
def test_log_sum_exp_in_another_order(case: Case, operators: Callable[[str], None]) -> None:
    operators("A3")
    problem = shared(case, torch.float16)
    out, lse = run_ordered("MASK_MINDIESD", problem, "tokens first", return_lse=True)
    judge.check_output(out, problem)
    judge.check_lse(lse, problem)


@pytest.mark.parametrize("name", ["mask_torch_npu", "mask_mindiesd"])
def test_the_op_serves_an_order_per_head_and_a_tail(name: str, operators: Callable[[str], None]) -> None:
    """It gathers for the operator, whose rows take one order for all heads, and merges the tail into the result."""
    operators("A2")
    p = build(Case("tail", plan="uneven", tail=True, batch=2, heads=4, key_lengths=(300, 129)), torch.bfloat16)
    forward = torch.stack([torch.randperm(300), torch.randperm(300)])
    order = TokenOrder(forward, forward.argsort(-1), (0, 1), (0, 300), 300)
    tensors = (order.undo(x) for x in (p.query, p.key, p.value))
    call = SparseCall(*tensors, p.plan, 64**-0.5, False, p.key_lengths, True, order.forward, order.inverse, p.tail)
    out, lse = compute(call, next(row for row in TABLE if row.name == name))
    assert lse is not None
    judge.check_output(order.apply(out).contiguous(), p)
    judge.check_lse(order.apply(lse.transpose(1, 2)).transpose(1, 2), p)


class Copies(TorchDispatchMode):
    """Counts the operators that fill a new tensor of at least so many numbers from another tensor."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self._numel, self.names = numel, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.numel() >= self._numel]
        if given and any(x.untyped_storage().data_ptr() not in given for x in made):
            self.names.append(func.overloadpacket.__name__)
        return result


def _copies(name: str, stored: str, dim: int, monkeypatch: pytest.MonkeyPatch, *, ordered: bool, padded: bool) -> list[str]:
    """The copies of one call, result included, around an operator that makes none."""
    lse = torch.zeros(2 * 2 * 300)
    monkeypatch.setattr(Operator, "load", lambda self: lambda query, *args, **kwargs: (query, lse))
    monkeypatch.setattr(ascend, "soc_generation", lambda: "A2")
    q, k, v = (STORED[stored](torch.randn(2, 300, 2, dim, dtype=torch.bfloat16)) for _ in range(3))
    forward = torch.randperm(300)
    order = (forward, forward.argsort()) if ordered else (None, None)
    lengths = torch.tensor([300, 200]) if padded else None
    with Copies(q.numel()) as copies:
        out, _ = getattr(ascend, name).run(SparseCall(q, k, v, BlockPlan.full(300, 300), 0.1, False, lengths, False, *order))
        out.contiguous()
    return copies.names


CALLS = [(name, padded) for name in BLOCK_SPARSE for padded in (False, True) if not padded or name.startswith("MASK")]


@pytest.mark.parametrize(("name", "padded"), CALLS)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dim", [64, 128])
def test_a_tensor_is_copied_once(name: str, padded: bool, stored: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an order, one gather for each of query, key, value and result. Without: one, or none where the operator takes what there is."""
    assert _copies(name, stored, dim, monkeypatch, ordered=True, padded=padded) == ["index_select"] * 4
    without = _copies(name, stored, dim, monkeypatch, ordered=False, padded=padded)
    heads_first = padded or name.startswith("COUNTED")
    in_place = stored == ("heads first" if heads_first else "tokens first")
    assert len(without) == (0 if in_place else 3) + heads_first


@pytest.mark.parametrize(("name", "padded"), CALLS)
@pytest.mark.parametrize("dim", [32, 96])
def test_a_padded_head_size_costs_one_copy_more(name: str, padded: bool, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = _copies(name, "tokens first", dim, monkeypatch, ordered=True, padded=padded)
    assert names == ["index_select", "constant_pad_nd"] * 3 + ["index_select"]


def test_row_numbers_are_worked_out_once_for_an_order_and_go_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = [], ascend_layout._row_numbers
    monkeypatch.setattr(ascend_layout, "_row_numbers", lambda *arguments: made.append(arguments[1:]) or make(*arguments))
    order = torch.randperm(40)
    before = len(ascend_layout._rows_of)
    for heads, batch in ((2, 1), (4, 1), (2, 1), (2, 3), (4, 1)):
        ascend_layout.arranged(torch.randn(batch, 40, heads, 64), "BNSD", 64, order)
    assert made == [(1, 2, False), (1, 4, False), (3, 2, False)]
    assert len(ascend_layout._rows_of) == before + 1
    made.clear()
    del order
    gc.collect()
    assert len(ascend_layout._rows_of) == before


@pytest.mark.parametrize("row", [row for row in TABLE if row.devices == ("npu",)], ids=lambda row: row.name)
def test_the_op_leaves_the_order_to_the_adapters(row: Implementation) -> None:
    assert row.orders_tokens


@pytest.mark.parametrize("name", ["mask_torch_npu", "index_attentions", "counted_sgl_kernel_npu"])
def test_refusals_name_the_limit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(row for row in TABLE if row.name == name)
    assert row.mismatch(CallFacts("npu", torch.bfloat16, 64, frozenset({"other_block_size"}))) == "does not honour other_block_size"
    odd = row.mismatch(CallFacts("npu", torch.bfloat16, 64, frozenset({"gqa"}), group=3))
    assert odd == (None if name.startswith("counted") else "takes 1, 2, 4, ... 64 query heads per key head, not 3")
    assert row.mismatch(CallFacts("npu", torch.float32, 64)) == "takes bfloat16, float16, not float32"
    assert row.mismatch(CallFacts("npu", torch.bfloat16, 72)) is None
    assert row.mismatch(CallFacts("npu", torch.bfloat16, 256)) == "takes head sizes 8, 16, ... 128, not 256"
    assert row.mismatch(CallFacts("npu", torch.bfloat16, 64, frozenset({"causal"}))) == "does not honour causal"


def test_by_name_on_another_device_is_an_error() -> None:
    problem = build(CASES[0], torch.bfloat16)
    with pytest.raises(BackendUnavailable, match="runs on npu, not on cpu"):
        block_sparse_attention(problem.query, problem.key, problem.value, problem.plan, implementation="mask_torch_npu")
