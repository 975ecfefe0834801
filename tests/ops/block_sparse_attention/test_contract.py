"""Every implementation of block-sparse attention that this machine can run, on every case, against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import judge
from cases import DEVICES, DTYPES, SPARSE_CASES, Case, build, shared
from ditattn.errors import UnsupportedCall
from ditattn.ops import cpu_call, cpu_library
from ditattn.ops.block_mean import block_mean
from ditattn.ops.block_sparse_attention import TABLE, block_sparse_attention, block_sparse_attention_with_lse, pure_torch
from ditattn.ops.calls import SparseCall
from ditattn.ops.dense_attention import dense_attention
from ditattn.plan.block_plan import BlockPlan
from ditattn.plan.token_order import TokenOrder, token_order
from largest_tensor import LargestTensor

COMBINATIONS = [
    pytest.param(name, case, dtype, device, id=f"{name}-{case}-{str(dtype)[6:]}-{device}")
    for device in DEVICES
    for dtype in DTYPES
    for case in SPARSE_CASES
    for name in judge.possible(TABLE, judge.facts_of(case, device, dtype))
]
PLAIN = Case("plain", plan="uneven")
# by dtype, what runs here; rows for fp32 tensors alone come last
NAMES = [
    (name, device)
    for device in DEVICES
    for name in dict.fromkeys(
        name for dtype in (torch.bfloat16, torch.float32) for name in judge.possible(TABLE, judge.facts_of(PLAIN, device, dtype))
    )
]


def dtypes_of(name: str, device: str) -> list[torch.dtype]:
    """Dtypes that an implementation takes, the widest first."""
    return [dtype for dtype in DTYPES if name in judge.possible(TABLE, judge.facts_of(PLAIN, device, dtype))]


def half_of(name: str, device: str) -> torch.dtype:
    """bf16, or the narrowest dtype that an implementation takes."""
    taken = dtypes_of(name, device)
    return torch.bfloat16 if torch.bfloat16 in taken else taken[-1]


@pytest.mark.parametrize(("name", "case", "dtype", "device"), COMBINATIONS)
def test_error_is_in_proportion_to_torch(name: str, case: Case, dtype: torch.dtype, device: str) -> None:
    problem = shared(case, dtype, device)
    judge.check_output(
        block_sparse_attention(problem.query, problem.key, problem.value, problem.plan, **problem.options, implementation=name),
        problem,
        judge.coarser(TABLE, name),
    )


@pytest.mark.parametrize(("name", "case", "dtype", "device"), COMBINATIONS)
def test_log_sum_exp(name: str, case: Case, dtype: torch.dtype, device: str) -> None:
    if name not in judge.possible(TABLE, judge.facts_of(case, device, dtype, lse=True)):
        pytest.skip(f"{name} does not return the log-sum-exp")
    problem = shared(case, dtype, device)
    out, lse = block_sparse_attention_with_lse(
        problem.query, problem.key, problem.value, problem.plan, **problem.options, implementation=name
    )
    judge.check_output(out, problem, judge.coarser(TABLE, name))
    judge.check_lse(lse, problem, judge.coarser(TABLE, name))


@pytest.mark.parametrize(("name", "device", "dtype"), [(*row, dtype) for row in NAMES for dtype in dtypes_of(*row)])
def test_keeping_everything_is_dense_attention(name: str, device: str, dtype: torch.dtype) -> None:
    problem = build(Case("full", plan="full"), dtype, device)
    out = block_sparse_attention(problem.query, problem.key, problem.value, problem.plan, implementation=name)
    dense = dense_attention(problem.query, problem.key, problem.value, implementation="reference")
    assert judge.relative_error(out, dense.double()) < max(2 * judge.eps(TABLE, name, dtype), 1e-6)


@pytest.mark.parametrize(("name", "device"), NAMES)
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_propagate(name: str, device: str, which: str, poison: float) -> None:
    """Bad numbers never turn into plausible ones: what becomes NaN or infinite in exact arithmetic and in torch does so here."""
    for dtype in {dtypes_of(name, device)[0], half_of(name, device)}:
        problem = build(Case("poisoned", plan="full"), dtype, device)
        getattr(problem, which)[0, 150, 1, 5] = poison
        exact, torchs = judge.exact_result(problem)[0].isfinite(), judge.torch_result(problem).isfinite()
        out = block_sparse_attention(problem.query, problem.key, problem.value, problem.plan, implementation=name)
        # torch's half-precision kernel loses some infinities of keys: there the result is left open
        settled = exact == torchs
        assert settled.float().mean() > 0.4
        assert torch.equal(out.isfinite()[settled], exact[settled])


@pytest.mark.parametrize(("name", "device"), NAMES)
def test_autocast_changes_nothing(name: str, device: str) -> None:
    """The result has the query's dtype and accuracy, as the op's fake promises to compiled graphs."""
    problem = build(Case("autocast", plan="uneven"), dtypes_of(name, device)[0], device)

    def run() -> torch.Tensor:
        return block_sparse_attention(problem.query, problem.key, problem.value, problem.plan, implementation=name)

    expected = run()
    with torch.autocast(device, dtype=torch.bfloat16):
        out = run()
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("name", "device"), NAMES)
def test_same_input_same_bits(name: str, device: str) -> None:
    problem = build(replace(PLAIN, name="twice"), half_of(name, device), device)
    first, second = (block_sparse_attention(problem.query, problem.key, problem.value, problem.plan, implementation=name) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("name", "device", "dtype"), [(*row, dtype) for row in NAMES for dtype in dtypes_of(*row)])
@pytest.mark.parametrize("layout", ["padded", "transposed"])
def test_token_order_changes_nothing_but_the_place(name: str, device: str, dtype: torch.dtype, layout: str) -> None:
    """The same bits as on reordered copies, every token back at its place: whether or not the implementation reorders by itself."""
    grid = (3, 11, 10)
    problem = build(Case("ordered", plan="uneven", query_length=330, key_length=330, layout=layout), dtype, device)
    order = token_order("tile", grid, device=device)
    with_lse = "lse" in next(row for row in TABLE if row.name == name).honours
    tensors = (problem.query, problem.key, problem.value)
    if with_lse:
        out, lse = block_sparse_attention_with_lse(*tensors, problem.plan, order=order, implementation=name)
        expected, expected_lse = block_sparse_attention_with_lse(*map(order.apply, tensors), problem.plan, implementation=name)
        assert torch.equal(lse, expected_lse.index_select(2, order.inverse))
    else:
        out = block_sparse_attention(*tensors, problem.plan, order=order, implementation=name)
        expected = block_sparse_attention(*map(order.apply, tensors), problem.plan, implementation=name)
    assert torch.equal(out, order.undo(expected))
    assert not torch.equal(out, expected)


def _order_per_head(length: int, heads: int, device: str) -> TokenOrder:
    generator = torch.Generator().manual_seed(length)
    forward = torch.stack([torch.randperm(length, generator=generator) for _ in range(heads)]).to(device)
    return TokenOrder(forward, forward.argsort(-1), (0, 1), (0, length), length)


def _order_of_head(order: TokenOrder, head: int) -> TokenOrder:
    assert order.forward is not None
    assert order.inverse is not None
    return replace(order, forward=order.forward[head], inverse=order.inverse[head])


PER_HEAD = (
    Case("per head", plan="uneven"),
    Case("per head, grouped, batch, key lengths", plan="uneven", batch=2, heads=4, key_lengths=(300, 129)),
    Case("per head, plan shared", 2, 200, 200, plan="uneven", plan_batch=1, plan_heads=1, layout="transposed", dim=128),
)


@pytest.mark.parametrize(("name", "device"), NAMES)
@pytest.mark.parametrize("case", PER_HEAD, ids=str)
def test_an_order_per_head_is_each_group_in_its_own(name: str, device: str, case: Case) -> None:
    """The key heads at once, each with its order, give what each gives alone with that order for all its tokens."""
    facts = {dtype: judge.facts_of(case, device, dtype, lse=True) for dtype in DTYPES}
    for dtype in [dtype for dtype in DTYPES if name in judge.possible(TABLE, facts[dtype])]:
        p = build(case, dtype, device)
        order = _order_per_head(case.query_length, case.key_heads, device)
        out, lse = block_sparse_attention_with_lse(p.query, p.key, p.value, p.plan, **p.options, order=order, implementation=name)
        group = case.heads // case.key_heads
        for g in range(case.key_heads):
            heads = slice(g * group, (g + 1) * group)
            rows = slice(0, 1) if case.plan_heads == 1 else heads
            plan = replace(p.plan, indices=p.plan.indices[:, rows].contiguous(), counts=p.plan.counts[:, rows].contiguous())
            tensors = (p.query[:, :, heads], p.key[:, :, g : g + 1], p.value[:, :, g : g + 1])
            options = {**p.options, "order": _order_of_head(order, g), "implementation": name}
            alone, alone_lse = block_sparse_attention_with_lse(*tensors, plan, **options)
            if name in ("reference", "torch"):
                # products of other shapes may be added up in another order
                assert judge.relative_error(out[:, :, heads], alone.double()) < 4 * torch.finfo(dtype).eps
                torch.testing.assert_close(lse[:, heads], alone_lse, rtol=1e-6, atol=1e-5)
            else:
                assert torch.equal(out[:, :, heads], alone)
                assert torch.equal(lse[:, heads], alone_lse)


@pytest.mark.parametrize(("name", "device"), NAMES)
@pytest.mark.parametrize("spread", [lambda x: x[:1].expand(2), lambda x: x[::2]], ids=["expanded", "column"])
def test_key_lengths_of_any_stride(name: str, device: str, spread: Callable[[torch.Tensor], torch.Tensor]) -> None:
    problem = build(Case("strided", plan="full", batch=2, heads=1, key_heads=1, key_lengths=(200, 200)), dtypes_of(name, device)[0], device)
    assert problem.key_lengths is not None
    lengths = spread(torch.tensor([200, 290, 200, 290], device=device))
    assert not lengths.is_contiguous()
    out, expected = (
        block_sparse_attention(problem.query, problem.key, problem.value, problem.plan, key_lengths=x, implementation=name)
        for x in (lengths, problem.key_lengths)
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("name", "device"), NAMES)
def test_indices_wider_than_needed_change_nothing(name: str, device: str) -> None:
    problem = build(Case("wide", plan="random"), dtypes_of(name, device)[0], device)
    wide = block_sparse_attention(problem.query, problem.key, problem.value, problem.plan, implementation=name)
    narrow = block_sparse_attention(problem.query, problem.key, problem.value, problem.plan.trimmed(), implementation=name)
    assert torch.equal(wide, narrow)


@pytest.mark.parametrize(("name", "device"), NAMES)
@pytest.mark.parametrize("with_lse", [False, True])
def test_fake_agrees_with_the_real_op(name: str, device: str, with_lse: bool) -> None:
    problem = build(replace(PLAIN, layout="transposed"), half_of(name, device), device)
    arguments = (
        problem.query,
        problem.key,
        problem.value,
        problem.plan.indices,
        problem.plan.counts,
        128,
        0.1,
        False,
        None,
        with_lse,
        name,
    )
    real = torch.ops.ditattn.block_sparse_attention(*arguments)
    with FakeTensorMode() as mode:
        fake = torch.ops.ditattn.block_sparse_attention(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
    assert [(x.shape, x.dtype, x.stride()) for x in fake] == [(x.shape, x.dtype, x.stride()) for x in real]


@pytest.mark.parametrize(("name", "device"), NAMES)
def test_opcheck(name: str, device: str) -> None:
    problem = build(replace(PLAIN, query_length=140, key_length=140), dtypes_of(name, device)[0], device)
    arguments = (problem.query, problem.key, problem.value, problem.plan.indices, problem.plan.counts, 128, 0.1, False, None, True, name)
    torch.library.opcheck(torch.ops.ditattn.block_sparse_attention.default, arguments)


@pytest.mark.parametrize("with_lse", [False, True])
def test_memory_of_the_torch_implementation_is_bounded(with_lse: bool) -> None:
    """At density 0.9 the kept pairs of one head would take 236 MB in fp32; no tensor of the call exceeds the chunk."""
    mask = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)) < 0.9
    plan = BlockPlan.from_mask(mask, 8192, 8192)
    query, key, value = (torch.randn(1, 8192, 1, 32) for _ in range(3))
    with LargestTensor() as seen:
        pure_torch.run(SparseCall(query, key, value, plan, 0.1, return_lse=with_lse))
    assert seen.num_bytes <= pure_torch.CHUNK_BYTES


@pytest.mark.parametrize(("name", "device"), NAMES)
def test_a_plan_of_one_column_may_have_any_stride(name: str, device: str) -> None:
    problem = build(Case("one column", plan="first block"), dtypes_of(name, device)[0], device)
    narrow = problem.plan.trimmed()
    shape = narrow.indices.shape
    odd = replace(narrow, indices=narrow.indices.as_strided(shape, (shape[1] * shape[2], shape[2], 1, 7)))
    out, expected = (block_sparse_attention(problem.query, problem.key, problem.value, plan, implementation=name) for plan in (odd, narrow))
    assert torch.equal(out, expected)


def _changed(plan: BlockPlan, **fields: object) -> BlockPlan:
    return replace(plan, **fields)


BAD_PLANS = {
    "other query length": (lambda p: _changed(p, query_length=299), "299 x 300"),
    "other key length": (lambda p: _changed(p, key_length=1000), "300 x 1000"),
    "other batch": (lambda p: _changed(p, indices=p.indices.repeat(3, 1, 1, 1), counts=p.counts.repeat(3, 1, 1)), r"B, H = \[3, 2\]"),
    "other heads": (lambda p: _changed(p, indices=p.indices.repeat(1, 2, 1, 1), counts=p.counts.repeat(1, 2, 1)), r"B, H = \[1, 4\]"),
    "missing rows": (lambda p: _changed(p, indices=p.indices[:, :, 1:], counts=p.counts[:, :, 1:]), "3 query blocks"),
    "counts of another shape": (lambda p: _changed(p, counts=p.counts[:, :1]), r"must be \[B, H, M, K\] and \[B, H, M\]"),
}


@pytest.mark.parametrize("what", BAD_PLANS)
def test_plans_that_do_not_fit_say_why(what: str) -> None:
    problem = build(PLAIN, torch.float32)
    spoil, text = BAD_PLANS[what]
    with pytest.raises(UnsupportedCall, match=text):
        block_sparse_attention(problem.query, problem.key, problem.value, spoil(problem.plan))


def test_orders_that_do_not_fit_say_why() -> None:
    p = build(PLAIN, torch.float32)
    tile = token_order("tile", (3, 10, 10))
    assert tile.length == p.query.shape[1]
    with pytest.raises(UnsupportedCall, match="order is for 297 tokens, the call has 300"):
        block_sparse_attention(p.query, p.key, p.value, p.plan, order=token_order("tile", (3, 9, 11)))
    with pytest.raises(UnsupportedCall, match="the token order is on meta, the tensors on cpu"):
        block_sparse_attention(p.query, p.key, p.value, p.plan, order=replace(tile, inverse=torch.arange(300, device="meta")))
    with pytest.raises(UnsupportedCall, match="token orders for 3 key heads, the call has 2"):
        block_sparse_attention(p.query, p.key, p.value, p.plan, order=_order_per_head(300, 3, "cpu"))
    with pytest.raises(UnsupportedCall, match="causal call takes no token order"):
        block_sparse_attention(p.query, p.key, p.value, p.plan, order=tile, causal=True)


@pytest.mark.skipif(cpu_library.problem() is not None, reason="no compiled kernels")
@pytest.mark.parametrize("spoil", [lambda x: x.fill_(7), lambda x: x.sub_(1), lambda x: x.add_(1)], ids=["twice", "negative", "too large"])
def test_the_compiled_kernel_follows_no_broken_order(spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """It would write outside the result, or leave tokens of it unwritten."""
    p = build(PLAIN, torch.float32)
    tile = token_order("tile", (3, 10, 10))
    assert tile.forward is not None
    broken = TokenOrder(spoil(tile.forward.clone()), tile.inverse, tile.first_frame, tile.video, tile.length)
    second = _order_per_head(300, 2, "cpu")
    assert second.forward is not None
    spoil(second.forward[1])
    for order in (broken, second):
        with pytest.raises(UnsupportedCall, match="no permutation"):
            block_sparse_attention(p.query, p.key, p.value, p.plan, order=order, implementation="cpu")
        with pytest.raises(UnsupportedCall, match="no permutation"):
            block_mean(p.query, order=order, implementation="cpu")


@pytest.mark.skipif(cpu_library.problem() is not None, reason="no compiled kernels")
def test_the_compiled_kernel_takes_no_order_of_another_shape() -> None:
    """The op checks the order before, but layers that have chosen their implementation go past it."""
    p = build(PLAIN, torch.float32)
    for order in (torch.arange(299), torch.arange(300).int(), torch.arange(300).repeat(3, 1), torch.arange(300).view(1, 1, 300)):
        call = SparseCall(p.query, p.key, p.value, p.plan, 0.1, order=order, inverse=order)
        with pytest.raises(UnsupportedCall, match=r"is int64 \[300\], or \[G, 300\] with G key heads that divide 2, not"):
            cpu_call.attention(call)


@pytest.mark.parametrize("what", ["mixed dtypes", "nan scale", "eight bits", "unknown name"])
def test_bad_calls_say_what_is_wrong(what: str) -> None:
    p = build(PLAIN, torch.float32)
    calls = {
        "mixed dtypes": ((p.query, p.key, p.value.half()), {}, "share a dtype"),
        "nan scale": ((p.query, p.key, p.value), {"scale": float("nan")}, "finite"),
        "eight bits": (tuple(x.to(torch.float8_e4m3fn) for x in (p.query, p.key, p.value)), {}, "no implementation takes this call"),
        "unknown name": ((p.query, p.key, p.value), {"implementation": "magic"}, "no implementation named 'magic'"),
    }
    tensors, options, text = calls[what]
    with pytest.raises(UnsupportedCall, match=text):
        block_sparse_attention(*tensors, p.plan, **options)


def test_float64_is_served_by_what_torch_can_do() -> None:
    problem = build(Case("float64", plan="uneven", query_length=390, key_length=390, causal=True), torch.float64)
    exact, exact_lse = judge.exact_result(problem)
    for name in (None, "torch", "reference"):
        arguments = (problem.query, problem.key, problem.value, problem.plan)
        out = block_sparse_attention(*arguments, **problem.options, implementation=name)
        assert out.dtype == torch.float64
        torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)
        out, lse = block_sparse_attention_with_lse(*arguments, **problem.options, implementation=name)
        torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, exact_lse.float(), rtol=0, atol=1e-5)


def test_compiles_into_one_graph() -> None:
    problem = build(PLAIN, torch.bfloat16)
    compiled = torch.compile(lambda q, k, v: block_sparse_attention(q, k, v, problem.plan), fullgraph=True, backend="aot_eager")
    expected = block_sparse_attention(problem.query, problem.key, problem.value, problem.plan)
    assert torch.equal(compiled(problem.query, problem.key, problem.value), expected)
