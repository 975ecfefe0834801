"""Mistakes that were made elsewhere, planted here one at a time: each must be noticed by the checks that the real adapters pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import judge
from ascend_calls import CASES, LASER_CASES, STORED, check_laser, laser_of, run, run_ordered, stand_in_operators
from cases import Case, build
from ditattn.ops import ascend as shared
from ditattn.ops.block_sparse_attention import ascend, ascend_layout, ascend_operands
from ditattn.ops.dense_attention import ascend as dense_ascend
from ditattn.plan.block_plan import BlockPlan

Plant = Callable[[pytest.MonkeyPatch], None]


def replaced(module: Any, name: str, change: Callable[[Any], Any]) -> Plant:
    """`change` is applied to the result of a function."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: change(original(*args, **kwargs)))

    return plant


def value(module: Any, name: str, other: Any) -> Plant:
    return lambda monkeypatch: monkeypatch.setattr(module, name, other)


def first_elements_mask(plan: BlockPlan) -> BlockPlan:
    return BlockPlan(plan.indices[:1], plan.counts[:1], plan.query_length, plan.key_length)


def first_elements_plan(name: str) -> Plant:
    """Batch element 0's mask for all."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(ascend, name)
        monkeypatch.setattr(ascend, name, lambda call: original(replace(call, plan=first_elements_mask(call.plan))))

    return plant


def untransposed(x: Tensor, head_dim: int, length: int | None = None) -> Tensor:
    """The right shape with the wrong numbers in it."""
    batch, tokens, heads, dim = x.shape
    return shared.pad(x.reshape(batch, heads, tokens, dim), (0, head_dim - dim, 0, (length or tokens) - tokens)).contiguous()


def swapped_heads(x: Tensor, head_dim: int) -> Tensor:
    return ascend_layout.pad(x.transpose(1, 2), (0, head_dim - x.shape[3])).contiguous().view(-1, x.shape[2], head_dim)


def uncleared(out: Tensor, *rest: Any) -> Tensor:
    return out


BLOCK_SPARSE_MISTAKES: dict[str, tuple[str, Plant]] = {
    "mask: batch element 0 for all": ("MASK_TORCH_NPU", first_elements_plan("mask_inputs")),
    "index: batch element 0 for all": ("INDEX_ATTENTIONS", first_elements_plan("index_inputs")),
    "counted: batch element 0 for all": ("COUNTED_ATTENTIONS", first_elements_plan("counted_inputs")),
    "mask: heads and tokens swapped": ("MASK_TORCH_NPU", value(ascend_layout, "_packed", swapped_heads)),
    "index: heads and tokens swapped": ("INDEX_MINDIESD", value(ascend_layout, "_packed", swapped_heads)),
    "counted: not transposed": ("COUNTED_SGL_KERNEL_NPU", value(ascend_layout, "to_heads_first", untransposed)),
    "mask: transposed mask": ("MASK_MINDIESD", replaced(ascend, "mask_inputs", lambda i: i._replace(mask=i.mask.mT.contiguous()))),
    "index: rows of the first element only": (
        "INDEX_ATTENTIONS",
        replaced(ascend, "index_inputs", lambda i: i._replace(indices=i.indices[: len(i.indices) // 2])),
    ),
    "index: zeros for unused entries": (
        "INDEX_ATTENTIONS",
        replaced(ascend, "index_inputs", lambda i: i._replace(indices=i.indices.clamp(min=0))),
    ),
    "counted: columns not padded to 32": ("COUNTED_MINDIESD", value(ascend_operands, "COUNTED_MASK_COLUMNS", 1)),
    "counted: stale counts": ("COUNTED_ATTENTIONS", replaced(ascend, "counted_inputs", lambda i: i._replace(counts=i.counts + 1))),
    "mask: head size not padded": ("MASK_TORCH_NPU", value(ascend_operands, "padded_head_dim", lambda dim: dim)),
    "mask: cumulative lengths": (
        "MASK_TORCH_NPU",
        replaced(ascend, "mask_inputs", lambda i: i._replace(query_lengths=[i.query_lengths[0], 2 * i.query_lengths[0]])),
    ),
    "mask: the softmax mode of another generation": ("MASK_TORCH_NPU", value(ascend, "inner_precise", lambda generation: 4)),
    "index: fp16 softmax": ("INDEX_ATTENTIONS", value(ascend, "FP32_SOFTMAX", 1)),
    "mask: empty rows not cleared": ("MASK_TORCH_NPU", value(ascend_operands, "cleared", uncleared)),
    "index: empty rows not cleared": ("INDEX_ATTENTIONS", value(ascend_operands, "cleared", uncleared)),
    "counted: empty rows not filled": ("COUNTED_ATTENTIONS", value(ascend_operands, "_with_first", lambda keep, empty: keep)),
}


def block_sparse(name: str, scale: float | None = None) -> None:
    """The batch of 2, a padded head size, and rows without a block, all in one problem."""
    case = Case("all at once", batch=2, heads=4, key_heads=2, dim=32, query_length=517, key_length=517, plan="uneven", scale=scale)
    problem = cases.shared(case, torch.bfloat16)
    judge.check_output(run(name, problem)[0], problem)


@pytest.mark.parametrize("name", sorted({name for name, _ in BLOCK_SPARSE_MISTAKES.values()}))
def test_without_a_mistake_the_check_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_operators(monkeypatch, "A2")
    block_sparse(name)
    assert any(case.batch > 1 for case in CASES)


@pytest.mark.parametrize("mistake", BLOCK_SPARSE_MISTAKES)
def test_a_mistake_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_operators(monkeypatch, "A2")
    name, plant = BLOCK_SPARSE_MISTAKES[mistake]
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        block_sparse(name)


def ordered_sparse(name: str, stored: str) -> None:
    key_lengths = (517, 400) if name.startswith("MASK") and stored == "heads first" else None
    case = Case("ordered", batch=2, heads=4, key_heads=2, query_length=517, key_length=517, plan="uneven", key_lengths=key_lengths)
    problem = cases.shared(case, torch.bfloat16)
    judge.check_output(run_ordered(name, problem, stored)[0], problem)


def only_the_query(original: Any) -> Any:
    """The order is applied to the first of the three tensors alone."""

    def operands(tensors: tuple[Tensor, ...], layout: str, order: Any) -> Any:
        return (x for number in range(3) for x in original(tensors[number : number + 1], layout, None if number else order))

    return operands


def without_inverse(original: Any) -> Any:
    return lambda out, layout, like, inverse: original(out, layout, like, None).contiguous()


def order_instead_of_inverse(original: Any) -> Any:
    return lambda out, layout, like, inverse: original(out, layout, like, inverse.argsort())


def first_element_for_all(original: Any) -> Any:
    """Row numbers of batch element 0 in every batch element; a call that needs none would not notice."""
    return lambda order, batch, heads, *rest, **options: original(order, batch, heads, *rest, **options) % (order.shape[0] * heads)


def heads_beside_each_other(original: Any) -> Any:
    """Rows of the other layout than the one in memory."""
    return lambda order, batch, heads, *, from_heads_first: original(order, batch, heads, from_heads_first=not from_heads_first)


ORDER_MISTAKES: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "order of the query only": (ascend_operands, "_operands", only_the_query),
    "no inverse": (ascend_operands, "restored", without_inverse),
    "order instead of its inverse": (ascend_operands, "restored", order_instead_of_inverse),
    "rows of batch element 0 for all": (ascend_layout, "_rows", first_element_for_all),
    "rows of the other layout": (ascend_layout, "_rows", heads_beside_each_other),
}
WITH_ROWS = ("COUNTED_ATTENTIONS",)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", ["MASK_TORCH_NPU", "INDEX_ATTENTIONS", "COUNTED_ATTENTIONS"])
@pytest.mark.parametrize("mistake", [None, *ORDER_MISTAKES])
def test_a_mistake_with_the_order_is_noticed(mistake: str | None, name: str, stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_operators(monkeypatch, "A2")
    ordered_sparse(name, stored)
    if mistake is None:
        return
    module, function, change = ORDER_MISTAKES[mistake]
    needed, changed = [], change(getattr(module, function))
    monkeypatch.setattr(module, function, lambda *args, **kwargs: needed.append(1) or changed(*args, **kwargs))
    try:
        ordered_sparse(name, stored)
    except (AssertionError, RuntimeError, IndexError):
        return
    # packed tokens that lie packed need no row numbers
    assert not needed, "the mistake was not noticed"
    assert function == "_rows"
    assert name not in WITH_ROWS


@pytest.mark.parametrize("name", ["MASK_TORCH_NPU", "INDEX_ATTENTIONS", "COUNTED_ATTENTIONS"])
def test_a_wrong_scale_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale of the padded head size instead of the real one."""
    stand_in_operators(monkeypatch, "A2")
    original = getattr(ascend, name).run
    monkeypatch.setattr(type(getattr(ascend, name)), "run", lambda self, call: original(replace(call, scale=64**-0.5)))
    with pytest.raises(AssertionError, match="error"):
        block_sparse(name)


def scaled_back_twice(inputs: dense_ascend.LaserInputs) -> dense_ascend.LaserInputs:
    return inputs._replace(scale=inputs.scale * 256)


LASER_MISTAKES: dict[str, Plant] = {
    "padding not announced": value(dense_ascend, "LASER_LENGTH_MULTIPLE", 1),
    "padded columns kept": replaced(dense_ascend, "_la_preprocess_input", lambda i: i._replace(pre_tokens=2**31 - 1)),
    "not transposed": value(dense_ascend, "to_heads_first", untransposed),
    "wrong scale": replaced(dense_ascend, "_la_preprocess_input", scaled_back_twice),
    "factor not taken back": replaced(dense_ascend, "_la_postprocess_output", lambda out: out / 256),
    "bf16 handed over": replaced(dense_ascend, "_to_laser", lambda x: x.bfloat16()),
}


@pytest.mark.parametrize("mistake", [None, *LASER_MISTAKES])
def test_a_mistake_around_laser_is_noticed(mistake: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_operators(monkeypatch, "A2")
    problem = build(LASER_CASES[5], torch.bfloat16)
    if mistake is None:
        check_laser(laser_of("LASER_MINDIESD", problem), problem)
        return
    LASER_MISTAKES[mistake](monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check_laser(laser_of("LASER_MINDIESD", problem), problem)


@pytest.mark.parametrize("case", LASER_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_laser(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_operators(monkeypatch, "A3")
    problem = build(case, dtype)
    check_laser(laser_of("LASER_SGL_KERNEL_NPU", problem), problem)
