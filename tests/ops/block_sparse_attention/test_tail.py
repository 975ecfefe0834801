"""Every implementation of block-sparse attention with a pooled tail, on every case without a causal mask, against the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import judge
from cases import DEVICES, DTYPES, TAIL_CASES, Case, Problem, build, shared
from ditattn.errors import UnsupportedCall
from ditattn.ops.block_sparse_attention import TABLE, block_sparse_attention, block_sparse_attention_with_lse, tail_merge
from ditattn.ops.block_sparse_attention.pure_torch import run as run_torch
from ditattn.ops.calls import SparseCall
from ditattn.ops.pooled_tail import PooledTail
from ditattn.ops.table import CallFacts
from ditattn.plan.block_plan import BlockPlan
from ditattn.plan.token_order import TokenOrder
from largest_tensor import LargestTensor

COMBINATIONS = [
    pytest.param(name, case, dtype, device, id=f"{name}-{case}-{str(dtype)[6:]}-{device}")
    for device in DEVICES
    for dtype in DTYPES
    for case in TAIL_CASES
    for name in judge.possible(TABLE, judge.facts_of(case, device, dtype, lse=True))
]
PLAIN = Case("tail", plan="uneven", tail=True)
FEW = (
    PLAIN,
    Case("tail, grouped, batch, key lengths", plan="uneven", tail=True, batch=2, heads=4, key_lengths=(300, 129)),
    Case("tail, plan shared", plan="uneven", tail=True, batch=2, plan_batch=1, plan_heads=1, layout="transposed", dim=128),
)
NAMES = [
    pytest.param(name, dtype, device, id=f"{name}-{str(dtype)[6:]}-{device}")
    for device in DEVICES
    for dtype in DTYPES
    for name in judge.possible(TABLE, judge.facts_of(PLAIN, device, dtype, lse=True))
]


def attend(problem: Problem, name: str, tail: PooledTail | None, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = (problem.query, problem.key, problem.value)
    return block_sparse_attention_with_lse(*tensors, problem.plan, tail=tail, implementation=name, **problem.options, **options)


@pytest.mark.parametrize(("name", "case", "dtype", "device"), COMBINATIONS)
def test_error_is_in_proportion_to_torch(name: str, case: Case, dtype: torch.dtype, device: str) -> None:
    problem = shared(case, dtype, device)
    out, lse = attend(problem, name, problem.tail)
    judge.check_output(out, problem, judge.coarser(TABLE, name))
    judge.check_lse(lse, problem, judge.coarser(TABLE, name))


@pytest.mark.parametrize(("name", "dtype", "device"), NAMES)
def test_without_the_log_sum_exp_the_result_is_the_same(name: str, dtype: torch.dtype, device: str) -> None:
    p = build(PLAIN, dtype, device)
    out = block_sparse_attention(p.query, p.key, p.value, p.plan, tail=p.tail, implementation=name)
    assert torch.equal(out, attend(p, name, p.tail)[0])
    assert not torch.equal(out, attend(p, name, None)[0])


@pytest.mark.parametrize(("name", "dtype", "device"), NAMES)
def test_where_nothing_is_dropped_the_tail_changes_no_bit(name: str, dtype: torch.dtype, device: str) -> None:
    p = build(Case("nothing dropped", plan="full", tail=True, batch=2, key_lengths=(300, 200)), dtype, device)
    for with_tail, without in zip(attend(p, name, p.tail), attend(p, name, None), strict=True):
        assert torch.equal(with_tail, without)


@pytest.mark.parametrize(("name", "dtype", "device"), NAMES)
def test_all_but_one_block_dropped_is_the_formula(name: str, dtype: torch.dtype, device: str) -> None:
    """One query at a time in float64, the last block short."""
    p = build(Case("one block", plan="first block", tail=True, heads=1, key_heads=1, dim=32), dtype, device)
    out, _ = attend(p, name, p.tail)
    query, key, value = (x[0, :, 0].double() for x in (p.query, p.key, p.value))
    means = [(key[a:b].mean(0), value[a:b].mean(0), b - a) for a, b in ((128, 256), (256, 300))]
    unit = judge.eps(TABLE, name, dtype)
    for i in (0, 127, 128, 299):
        weights = [(torch.dot(query[i], key[j]) / 32**0.5).exp() for j in range(128)]
        terms = [weight * value[j] for j, weight in enumerate(weights)]
        weights += [number * (torch.dot(query[i], mean) / 32**0.5).exp() for mean, _, number in means]
        terms += [weight * mean for weight, (_, mean, _) in zip(weights[128:], means, strict=True)]
        expected = torch.stack(terms).sum(0) / torch.stack(weights).sum()
        assert judge.relative_error(out[0, i, 0], expected) < max(2 * unit, 2e-6)


@pytest.mark.parametrize(("name", "dtype", "device"), NAMES)
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("per_head", [False, True], ids=["one order", "an order per head"])
def test_a_tail_in_another_order(name: str, dtype: torch.dtype, device: str, case: Case, per_head: bool) -> None:
    """What the same call gives on reordered copies, every token back at its place."""
    p = build(case, dtype, device)
    generator = torch.Generator().manual_seed(1)
    forward = torch.stack([torch.randperm(case.query_length, generator=generator) for _ in range(case.key_heads)]).to(device)
    forward = forward if per_head else forward[0]
    order = TokenOrder(forward, forward.argsort(-1), (0, 1), (0, case.query_length), case.query_length)
    tail = PooledTail.of(p.key, p.value, order, p.key_lengths)
    out, lse = attend(p, name, tail, order=order)
    copies = replace(p, query=order.apply(p.query), key=order.apply(p.key), value=order.apply(p.value))
    expected, expected_lse = attend(copies, name, PooledTail.of(copies.key, copies.value, None, p.key_lengths))
    assert torch.equal(order.apply(out), expected)
    assert torch.equal(order.apply(lse.transpose(1, 2)).transpose(1, 2), expected_lse)


@pytest.mark.parametrize(("name", "dtype", "device"), NAMES)
def test_kept_blocks_and_padding_never_enter_the_tail(name: str, dtype: torch.dtype, device: str) -> None:
    """Whatever stands in the means of kept blocks and of empty ones, NaN included, no row that does not drop them sees it."""
    p = build(Case("poisoned", plan="first block", tail=True, key_lengths=(200,)), dtype, device)
    assert p.tail is not None
    assert p.tail.counts.tolist() == [[128, 72, 0]]
    key, value = p.tail.key.clone(), p.tail.value.clone()
    key[:, [0, 2]], value[:, 2] = torch.nan, torch.nan
    for poisoned, clean in zip(attend(p, name, replace(p.tail, key=key, value=value)), attend(p, name, p.tail), strict=True):
        assert torch.equal(poisoned, clean)


@pytest.mark.parametrize(("name", "dtype", "device"), NAMES)
@pytest.mark.parametrize("counts", ["int64", "int32", "one row", "strided"])
def test_counts_of_any_kind(name: str, dtype: torch.dtype, device: str, counts: str) -> None:
    p = build(replace(PLAIN, batch=2), dtype, device)
    assert p.tail is not None
    full = p.tail.counts.expand(2, -1)
    given = {
        "int64": full.long(),
        "int32": full.int(),
        "one row": full[:1],
        "strided": full.repeat_interleave(2, dim=1)[:, ::2],
    }[counts]
    expected = attend(p, name, replace(p.tail, counts=full.contiguous()))
    assert torch.equal(attend(p, name, replace(p.tail, counts=given))[0], expected[0])


@pytest.mark.parametrize(("name", "dtype", "device"), NAMES)
def test_means_of_any_stride(name: str, dtype: torch.dtype, device: str) -> None:
    p = build(PLAIN, dtype, device)
    assert p.tail is not None
    key = torch.stack([p.tail.key, p.tail.key + 1], dim=-1)[..., 0]
    value = p.tail.value.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attend(p, name, replace(p.tail, key=key, value=value))[0], attend(p, name, p.tail)[0])


@pytest.mark.parametrize(("name", "dtype", "device"), NAMES)
def test_zero_scale_and_more_blocks_than_a_step(name: str, dtype: torch.dtype, device: str) -> None:
    """140 key blocks: more means than there are tokens in a block."""
    case = Case("many blocks", plan="uneven", tail=True, heads=1, key_heads=1, dim=32, query_length=150, key_length=140 * 128 - 3)
    for scale in (None, 0.0):
        p = shared(replace(case, scale=scale), dtype, device)
        out, lse = attend(p, name, p.tail)
        judge.check_output(out, p, judge.coarser(TABLE, name))
        judge.check_lse(lse, p, judge.coarser(TABLE, name))


def test_the_tail_of_real_tokens_only() -> None:
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(3, 300, 4, 32, generator=generator) for _ in range(2))
    lengths = torch.tensor([300, 129, 0])
    forward = torch.stack([torch.randperm(300, generator=generator) for _ in range(2)])
    for index in (None, forward[0], forward):
        order = TokenOrder(index, None if index is None else index.argsort(-1), (0, 1), (0, 300), 300)
        ordered = {name: order.apply(x).clone() for name, x in (("key", key), ("value", value))}
        for b, n in enumerate(lengths.tolist()):
            for x in ordered.values():
                x[b, n:] = torch.nan
        tail = PooledTail.of(order.undo(ordered["key"]), order.undo(ordered["value"]), order, lengths)
        assert tail.counts.tolist() == [[128, 128, 44], [128, 1, 0], [0, 0, 0]]
        for name, x in ordered.items():
            means = getattr(tail, name)
            assert means.shape == (3, 3, 4, 32)
            for b, n in enumerate(lengths.tolist()):
                for block in range(3):
                    real = x[b, block * 128 : min((block + 1) * 128, n)].double()
                    expected = real.mean(0) if len(real) else torch.zeros(4, 32).double()
                    torch.testing.assert_close(means[b, block].double(), expected, rtol=1e-6, atol=1e-6)


def test_memory_of_the_merge_is_bounded() -> None:
    """16384 queries and 1024 key blocks: all scores of the means would take 64 MiB for each of the four heads."""
    query = torch.randn(1, 16384, 4, 8)
    key, value = (torch.randn(1, 131072, 1, 8) for _ in range(2))
    plan = BlockPlan.from_mask(torch.eye(128, 1024, dtype=torch.bool)[None, None], 16384, 131072)
    call = SparseCall(query, key, value, plan, 0.1, tail=PooledTail.of(key, value))
    out, lse = run_torch(replace(call, tail=None, return_lse=True))
    assert lse is not None
    with LargestTensor() as seen:
        tail_merge.merged(call, out, lse)
    assert seen.num_bytes <= tail_merge.CHUNK_BYTES


def test_bad_tails_say_what_is_wrong() -> None:
    p = build(Case("bad", plan="uneven", tail=True, batch=2), torch.float32)
    tail = p.tail
    assert tail is not None
    bad = {
        r"tail's key must be float32 \[2, 3, 2, 64\] on cpu, not torch.float32 \[2, 2, 2, 64\]": {"key": tail.key[:, 1:]},
        "tail's value must be float32 .* not torch.bfloat16": {"value": tail.value.bfloat16()},
        "tail's value .* on meta": {"value": tail.value.to("meta")},
        r"tail's counts must be \[2 or 1, 3\] on cpu, not \[3, 3\]": {"counts": tail.counts[:1].expand(3, -1)},
        r"not \[3\] on cpu": {"counts": tail.counts[0]},
    }
    for text, fields in bad.items():
        with pytest.raises(UnsupportedCall, match=text):
            attend(p, "reference", replace(tail, **fields))
    with pytest.raises(UnsupportedCall, match="causal call takes no tail"):
        block_sparse_attention(p.query, p.key, p.value, p.plan, tail=tail, causal=True)


def test_a_row_honours_a_tail_where_it_can_return_the_log_sum_exp() -> None:
    assert all(("tail" in row.honours) == ("lse" in row.honours) for row in TABLE)
    listed = next(row for row in TABLE if row.name == "index_attentions")
    assert listed.mismatch(CallFacts("npu", torch.bfloat16, 64, frozenset({"tail"}))) == "does not honour tail"


def test_calls_with_and_without_a_tail_are_of_different_kinds() -> None:
    """A layer keeps the row that it chose for a kind of call."""
    p = build(PLAIN, torch.float32)
    plain = SparseCall(p.query, p.key, p.value, p.plan, 0.1)
    assert replace(plain, tail=p.tail).kind() != plain.kind()
    assert replace(plain, tail=p.tail).facts().needs - plain.facts().needs == {"tail"}


@pytest.mark.parametrize(("name", "dtype", "device"), NAMES)
def test_opcheck_and_fake(name: str, dtype: torch.dtype, device: str) -> None:
    p = build(replace(PLAIN, query_length=140, key_length=140), dtype, device)
    assert p.tail is not None
    order = torch.arange(140, device=device).flip(0)
    means = (p.tail.key, p.tail.value, p.tail.counts)
    arguments = (p.query, p.key, p.value, p.plan.indices, p.plan.counts, 128, 0.1, False, None, True, name, order, order, *means)
    torch.library.opcheck(torch.ops.ditattn.block_sparse_attention.default, arguments)
    real = torch.ops.ditattn.block_sparse_attention(*arguments)
    with FakeTensorMode() as mode:
        fake = torch.ops.ditattn.block_sparse_attention(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
    assert [(x.shape, x.dtype, x.stride()) for x in fake] == [(x.shape, x.dtype, x.stride()) for x in real]


def test_compiles_into_one_graph() -> None:
    p = build(PLAIN, torch.bfloat16)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return block_sparse_attention(q, k, v, p.plan, tail=PooledTail.of(k, v))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(p.query, p.key, p.value), run(p.query, p.key, p.value))
