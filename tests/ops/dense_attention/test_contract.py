"""Every implementation of dense attention that this machine can run, on every case, against the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import judge
from cases import DENSE_CASES, DEVICES, DTYPES, Case, build, shared
from ditattn.errors import BackendUnavailable, UnsupportedCall
from ditattn.ops.dense_attention import TABLE, dense_attention

COMBINATIONS = [
    pytest.param(name, case, dtype, device, id=f"{name}-{case}-{str(dtype)[6:]}-{device}")
    for device in DEVICES
    for dtype in DTYPES
    for case in DENSE_CASES
    for name in judge.possible(TABLE, judge.facts_of(case, device, dtype))
]
# by dtype, what runs here; rows for fp32 tensors alone come last
NAMES = [
    (name, device)
    for device in DEVICES
    for name in dict.fromkeys(
        name for dtype in (torch.bfloat16, torch.float32) for name in judge.possible(TABLE, judge.facts_of(Case("plain"), device, dtype))
    )
]


def _taken(name: str, device: str) -> list[torch.dtype]:
    """Of fp32 and bf16, what an implementation takes."""
    wanted = (torch.float32, torch.bfloat16)
    return [dtype for dtype in wanted if name in judge.possible(TABLE, judge.facts_of(Case("plain"), device, dtype))]


@pytest.mark.parametrize(("name", "case", "dtype", "device"), COMBINATIONS)
def test_error_is_in_proportion_to_torch(name: str, case: Case, dtype: torch.dtype, device: str) -> None:
    problem = shared(case, dtype, device)
    judge.check_output(
        dense_attention(problem.query, problem.key, problem.value, **problem.options, attn_mask=problem.attn_mask, implementation=name),
        problem,
        judge.coarser(TABLE, name),
    )


@pytest.mark.parametrize(("name", "device"), NAMES)
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_propagate(name: str, device: str, which: str, poison: float) -> None:
    """Bad numbers never turn into plausible ones: what becomes NaN or infinite in exact arithmetic and in torch does so here."""
    for dtype in _taken(name, device):
        problem = build(Case("poisoned"), dtype, device)
        getattr(problem, which)[0, 150, 1, 5] = poison
        exact, torchs = judge.exact_result(problem)[0].isfinite(), judge.torch_result(problem).isfinite()
        out = dense_attention(problem.query, problem.key, problem.value, implementation=name)
        # torch's half-precision kernel loses some infinities of keys: there the result is left open
        settled = exact == torchs
        assert settled.float().mean() > 0.4
        assert torch.equal(out.isfinite()[settled], exact[settled])


@pytest.mark.parametrize(("name", "device"), NAMES)
def test_autocast_changes_nothing(name: str, device: str) -> None:
    """The result has the query's dtype and accuracy, as the op's fake promises to compiled graphs."""
    problem = build(Case("autocast"), _taken(name, device)[0], device)

    def run() -> torch.Tensor:
        return dense_attention(problem.query, problem.key, problem.value, implementation=name)

    expected = run()
    with torch.autocast(device, dtype=torch.float16 if problem.query.dtype == torch.bfloat16 else torch.bfloat16):
        out = run()
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("name", "device"), NAMES)
def test_same_input_same_bits(name: str, device: str) -> None:
    problem = build(Case("twice", query_length=517, key_length=517), _taken(name, device)[-1], device)
    first, second = (dense_attention(problem.query, problem.key, problem.value, implementation=name) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("name", "device"), NAMES)
def test_fake_agrees_with_the_real_op(name: str, device: str) -> None:
    problem = build(Case("fake", layout="transposed"), _taken(name, device)[-1], device)
    real = dense_attention(problem.query, problem.key, problem.value, implementation=name)
    with FakeTensorMode() as mode:
        fake = dense_attention(*(mode.from_tensor(x) for x in (problem.query, problem.key, problem.value)), implementation=name)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize(("name", "device"), NAMES)
def test_opcheck(name: str, device: str) -> None:
    problem = build(Case("opcheck", query_length=40, key_length=30), _taken(name, device)[0], device)
    arguments = (problem.query, problem.key, problem.value, 0.1, False, None, None, name)
    torch.library.opcheck(torch.ops.ditattn.dense_attention.default, arguments)


def test_every_row_of_the_table_was_tested_or_says_why_not() -> None:
    tested = {parameters.values[0] for parameters in COMBINATIONS}
    facts = judge.facts_of(Case("plain"), "cpu", torch.float32)
    silent = [row.name for row in TABLE if row.name not in tested and not row.refusal(facts)]
    assert not silent


PLAIN = build(Case("plain", query_length=30, key_length=30), torch.float32)
BAD_CALLS = {
    "three axes": (lambda p: replace(p, query=p.query[0]), "must be"),
    "other key length": (lambda p: replace(p, key=p.key[:, 1:]), "same shape"),
    "other head size": (lambda p: replace(p, query=p.query[..., :32]), "head size"),
    "other batch": (lambda p: replace(p, query=p.query.repeat(2, 1, 1, 1)), "batch"),
    "no tokens": (lambda p: replace(p, query=p.query[:, :0]), "empty"),
    "no keys": (lambda p: replace(p, key=p.key[:, :0], value=p.value[:, :0]), "empty"),
    "heads do not divide": (lambda p: replace(p, query=p.query.repeat(1, 1, 2, 1)[:, :, :3]), "multiple"),
    "mixed dtypes": (lambda p: replace(p, value=p.value.bfloat16()), "share a dtype"),
    "integers": (lambda p: replace(p, query=p.query.int(), key=p.key.int(), value=p.value.int()), "floating"),
    "key_lengths too long": (lambda p: replace(p, key_lengths=torch.tensor([3, 3])), "key_lengths"),
    "key_lengths not integer": (lambda p: replace(p, key_lengths=torch.tensor([3.0])), "key_lengths"),
    "key_lengths are flags": (lambda p: replace(p, key_lengths=torch.tensor([True])), "int32 or int64 .1. on cpu, not torch.bool"),
    "key_lengths too narrow": (lambda p: replace(p, key_lengths=torch.tensor([3]).byte()), "int32 or int64 .1. on cpu, not torch.uint8"),
    "key_lengths elsewhere": (lambda p: replace(p, key_lengths=torch.tensor([3], device="meta")), "on cpu, not torch.int64 .1. on meta"),
    "scale is NaN": (lambda p: replace(p, scale=float("nan")), "finite"),
    "scale is infinite": (lambda p: replace(p, scale=float("inf")), "finite"),
    "scale is infinite in fp32": (lambda p: replace(p, scale=1e300), "finite in fp32, not 1e[+]300"),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_calls_say_what_is_wrong(what: str) -> None:
    spoil, text = BAD_CALLS[what]
    problem = spoil(PLAIN)
    with pytest.raises(UnsupportedCall, match=text):
        dense_attention(problem.query, problem.key, problem.value, **problem.options)


@pytest.mark.parametrize(("name", "device"), NAMES)
def test_a_scale_that_is_zero_in_fp32_is_zero(name: str, device: str) -> None:
    problem = build(Case("tiny scale", causal=True), torch.float32, device)
    if name not in judge.possible(TABLE, judge.facts_of(Case("causal", causal=True), device, torch.float32)):
        pytest.skip(f"{name} is not causal")
    tiny, zero = (
        dense_attention(problem.query, problem.key, problem.value, scale=scale, causal=True, implementation=name) for scale in (1e-50, 0.0)
    )
    assert bool(tiny.isfinite().all())
    assert torch.equal(tiny, zero)


def test_a_dtype_that_nobody_takes_is_refused_with_every_reason() -> None:
    eight_bits = [x.to(torch.float8_e4m3fn) for x in (PLAIN.query, PLAIN.key, PLAIN.value)]
    with pytest.raises(UnsupportedCall, match="takes float32, bfloat16, float16, float64, not float8_e4m3fn"):
        dense_attention(*eight_bits)


def test_float64_is_served_by_what_torch_can_do() -> None:
    problem = build(Case("float64", batch=2, key_lengths=(300, 17), causal=True), torch.float64)
    exact, _ = judge.exact_result(problem)
    for name in (None, "torch", "reference"):
        out = dense_attention(problem.query, problem.key, problem.value, **problem.options, implementation=name)
        assert out.dtype == torch.float64
        torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)
    with pytest.raises(UnsupportedCall, match="takes float32, bfloat16, float16, not float64"):
        dense_attention(problem.query, problem.key, problem.value, implementation="cpu")


def test_unknown_name_lists_the_names() -> None:
    with pytest.raises(UnsupportedCall, match=r"no implementation named 'magic'; there is .*torch"):
        dense_attention(PLAIN.query, PLAIN.key, PLAIN.value, implementation="magic")


def test_named_implementation_that_cannot_honour_an_option_raises() -> None:
    with pytest.raises(UnsupportedCall, match="does not honour attn_mask"):
        dense_attention(PLAIN.query, PLAIN.key, PLAIN.value, attn_mask=torch.ones(30, 30).bool(), implementation="flash")


def test_errors_belong_to_the_tree() -> None:
    assert issubclass(UnsupportedCall, ValueError)
    assert issubclass(BackendUnavailable, ImportError)


def test_compiles_into_one_graph() -> None:
    problem = build(Case("compiled"), torch.bfloat16)
    compiled = torch.compile(lambda q, k, v: dense_attention(q, k, v, causal=True), fullgraph=True, backend="aot_eager")
    expected = dense_attention(problem.query, problem.key, problem.value, causal=True)
    assert torch.equal(compiled(problem.query, problem.key, problem.value), expected)


def test_names_are_tried_in_the_order_given() -> None:
    query, key, value = PLAIN.query, PLAIN.key, PLAIN.value
    expected = dense_attention(query, key, value, implementation="torch")
    assert torch.equal(dense_attention(query, key, value, implementation=["laser_mindiesd", "torch", "reference"]), expected)
    with pytest.raises(BackendUnavailable, match=r"'laser_mindiesd' or 'flash'.*laser_mindiesd: runs on npu, not on cpu; flash: does not"):
        dense_attention(query, key, value, attn_mask=torch.ones(30, 30).bool(), implementation=("laser_mindiesd", "flash"))


def test_a_list_in_one_string_is_no_list() -> None:
    with pytest.raises(UnsupportedCall, match="no implementation named 'laser_mindiesd,torch'"):
        dense_attention(PLAIN.query, PLAIN.key, PLAIN.value, implementation="laser_mindiesd,torch")


def test_names_reach_a_compiled_graph() -> None:
    query, key, value = PLAIN.query, PLAIN.key, PLAIN.value
    names = ("laser_mindiesd", "reference")
    compiled = torch.compile(lambda q, k, v: dense_attention(q, k, v, implementation=names), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, key, value), dense_attention(query, key, value, implementation="reference"))


@pytest.mark.parametrize("name", ["torch", "reference", None])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64])
@pytest.mark.parametrize("axes", [0, 1, 2, 3])
def test_masks_of_fewer_axes_are_broadcast(name: str | None, dtype: torch.dtype, axes: int) -> None:
    query, key, value = PLAIN.query, PLAIN.key, PLAIN.value
    mask = torch.rand((1, 1, key.shape[1])[3 - axes :], generator=torch.Generator().manual_seed(1))
    mask = mask > 0.3 if dtype == torch.bool else mask.to(dtype)
    full = mask.expand(query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    found, expected = (dense_attention(query, key, value, attn_mask=x, implementation=name) for x in (mask, full.contiguous()))
    torch.testing.assert_close(found, expected)
