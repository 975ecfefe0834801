"""Every operation by every implementation, on tensors that lie in memory in any way: permuted, strided, offset, expanded, overlapping."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import judge
import oracle
from ditattn.ops import block_mean as mean_op
from ditattn.ops import block_sparse_attention as sparse_op
from ditattn.ops import dense_attention as dense_op
from ditattn.ops.block_mean import block_mean
from ditattn.ops.block_sparse_attention import block_sparse_attention
from ditattn.ops.contract import call_facts
from ditattn.ops.dense_attention import dense_attention
from ditattn.ops.table import CallFacts, Implementation
from ditattn.plan.block_plan import BlockPlan, num_blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# of the largest output, per dtype that products are formed in
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-10}
# interpreted, seconds per call
SLOW = {"triton"}
SEEDS = range(60)


def anyhow(shape: tuple[int, int, int, int], dtype: torch.dtype, dice: random.Random) -> Tensor:
    """Random numbers in a random layout; what lies beside them in memory is NaN."""
    kind = dice.choice(("plain", "permuted", "permuted", "overlapping"))
    if kind == "plain":
        return torch.randn(shape).to(dtype)
    if kind == "overlapping":
        _, length, heads, dim = shape
        strides = [*(dice.choice((0, 1, 7, dim, dim * heads, dim * length)) for _ in range(3)), dice.choice((1, 1, 1, 0, 2))]
        offset = dice.choice((0, 1, 3))
        room = 1 + offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        return torch.randn(room).to(dtype).as_strided(shape, strides, offset)
    own = tuple(1 if dice.random() < 0.2 else size for size in shape)
    axes = dice.sample(range(4), 4)
    cuts = [
        slice(start, start + own[axis] * step, step)
        for axis in axes
        for start, step in [(dice.choice((0, 0, 1, 5)), dice.choice((1, 1, 2, 3)))]
    ]
    memory = torch.full([cut.stop for cut in cuts], torch.nan, dtype=dtype)
    view = memory[tuple(cuts)].permute([axes.index(axis) for axis in range(4)])
    view.copy_(torch.randn(own))
    return view.expand(shape)


def attention_tensors(dtype: torch.dtype, dice: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    batch, key_heads, dim = dice.choice((1, 1, 2, 3)), dice.choice((1, 2)), dice.choice((32, 64, 72, 88, 96, 128))
    heads = key_heads * dice.choice((1, 2))
    length, num_keys = (dice.choice((1, 4, 61, 130)) for _ in range(2))
    shapes = (batch, length, heads, dim), (batch, num_keys, key_heads, dim), (batch, num_keys, key_heads, dim)
    query, key, value = (anyhow(shape, dtype, dice) for shape in shapes)
    return query, key, value


def options(query: Tensor, key: Tensor, dice: random.Random) -> dict[str, object]:
    lengths = torch.tensor([dice.randint(0, key.shape[1]) for _ in range(query.shape[0])])
    return {"causal": dice.random() < 0.3, "key_lengths": lengths if dice.random() < 0.3 else None}


def some_mask(query: Tensor, key: Tensor, dice: random.Random) -> Tensor | None:
    """An additive mask in a random layout, for some calls."""
    if dice.random() < 0.7:
        return None
    return anyhow((query.shape[0], query.shape[2], query.shape[1], key.shape[1]), query.dtype, dice)


def check(out: Tensor, exact: Tensor, name: str, row: Implementation, dtype: torch.dtype) -> None:
    # a row that rounds its inputs moves large logits, which repeated numbers make
    tolerance = TOLERANCE[dtype]
    if row.computes_in is not None:
        tolerance = max(tolerance, 5 * TOLERANCE[getattr(torch, row.computes_in) if row.parts == 1 else torch.float32])
    assert out.is_contiguous()
    error, allowed = (out.double() - exact).abs().max(), tolerance * (1 + exact.abs().max())
    assert error <= allowed, f"{name} is off by {error:.2e}, allowed {allowed:.2e}"


def rows(table: tuple[Implementation, ...], facts: object, seed: int) -> Iterator[tuple[str, Implementation]]:
    for name in judge.possible(table, facts):
        if name not in SLOW or seed < 3:
            yield name, next(row for row in table if row.name == name and row.runs_on("cpu"))


@pytest.mark.parametrize("seed", SEEDS)
def test_dense_attention(seed: int) -> None:
    dice, dtype = random.Random(seed), DTYPES[seed % 4]
    query, key, value = attention_tensors(dtype, dice)
    asked = {**options(query, key, dice), "attn_mask": some_mask(query, key, dice)}
    exact, _ = oracle.attention(query, key, value, **asked)
    needs = {"causal": asked["causal"], "key_lengths": asked["key_lengths"] is not None, "attn_mask": asked["attn_mask"] is not None}
    tested = list(rows(dense_op.TABLE, call_facts(query, key, **needs), seed))
    assert {"torch", "reference"} <= {name for name, _ in tested}
    for name, row in tested:
        check(dense_attention(query, key, value, **asked, implementation=name), exact, name, row, dtype)


@pytest.mark.parametrize("seed", SEEDS)
def test_block_sparse_attention(seed: int) -> None:
    dice, dtype = random.Random(seed), DTYPES[seed % 4]
    query, key, value = attention_tensors(dtype, dice)
    asked = options(query, key, dice)
    blocks = (query.shape[0], query.shape[2], num_blocks(query.shape[1]), num_blocks(key.shape[1]))
    plan = BlockPlan.from_mask(torch.rand(blocks) < 0.7, query.shape[1], key.shape[1])
    exact, _ = oracle.attention(query, key, value, **asked, plan=plan)
    facts = call_facts(query, key, causal=asked["causal"], key_lengths=asked["key_lengths"] is not None)
    tested = list(rows(sparse_op.TABLE, facts, seed))
    assert {"torch", "reference"} <= {name for name, _ in tested}
    for name, row in tested:
        check(block_sparse_attention(query, key, value, plan, **asked, implementation=name), exact, name, row, dtype)


@pytest.mark.parametrize("seed", SEEDS)
def test_block_mean(seed: int) -> None:
    dice, dtype = random.Random(seed), DTYPES[seed % 4]
    x = anyhow((dice.choice((1, 2)), dice.choice((1, 127, 128, 300)), dice.choice((1, 3)), dice.choice((32, 80))), dtype, dice)
    block = dice.choice((128, 64, 7))
    exact = oracle.block_mean(x, block)
    for name, row in rows(mean_op.TABLE, CallFacts("cpu", dtype, x.shape[3]), seed):
        check(block_mean(x, block, implementation=name), exact, name, row, torch.float32)
