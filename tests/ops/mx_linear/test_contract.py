"""Every implementation of MXFP4 linear layers that this machine can run, against float64 on the rounded operands."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import linear_calls
from cases import DEVICES, DTYPES
from ditattn.errors import BackendUnavailable, UnsupportedCall
from ditattn.ops.mx_linear import TABLE, MXWeight, arranged, mx_linear, quantized_weight
from ditattn.ops.mx_linear.call import LinearFacts
from ditattn.ops.table import explain
from linear_calls import CASES, LinearCase, build, check_linear


def _names(dtype: torch.dtype, device: str, *, dual_level: bool = False) -> list[str]:
    needs = frozenset({"dual_scale"} if dual_level else ())
    return [v.implementation.name for v in explain(TABLE, LinearFacts(device, dtype, 64, needs)) if v.reason is None]


COMBINATIONS = [
    pytest.param(name, case, dtype, device, id=f"{name}-{case}-{str(dtype)[6:]}-{device}")
    for device in DEVICES
    for dtype in DTYPES
    for case in CASES
    for name in _names(dtype, device, dual_level=case.dual_level)
]
NAMES = [(name, device) for device in DEVICES for name in _names(torch.float32, device, dual_level=True)]
DUAL = [False, True]
every_level = pytest.mark.parametrize("dual_level", DUAL, ids=["plain", "dual level"])


@pytest.mark.parametrize(("name", "case", "dtype", "device"), COMBINATIONS)
def test_cases(name: str, case: LinearCase, dtype: torch.dtype, device: str) -> None:
    problem = build(case, dtype, device)
    check_linear(mx_linear(problem.x, problem.weight, implementation=name, **problem.options), problem)


@pytest.mark.parametrize(("name", "device"), NAMES)
@every_level
def test_strided_input(name: str, device: str, dual_level: bool) -> None:
    problem = build(LinearCase("strided", 96, leading=(5, 3), dual_level=dual_level), torch.float32, device)
    strided = problem.x.new_full((3, 5, 192), torch.nan)[..., ::2].transpose(0, 1).copy_(problem.x)
    assert not strided.is_contiguous()
    found = mx_linear(strided, problem.weight, implementation=name, **problem.options)
    assert torch.equal(found, mx_linear(problem.x, problem.weight, implementation=name, **problem.options))


@pytest.mark.parametrize(("name", "device"), NAMES)
@every_level
def test_tokens_do_not_mix(name: str, device: str, dual_level: bool) -> None:
    """A NaN spoils its own token, in a block of its own features only."""
    problem = build(LinearCase("NaN", 96, leading=(4,), dual_level=dual_level), torch.float32, device)
    problem.x[2, 40] = torch.nan
    out = mx_linear(problem.x, problem.weight, implementation=name)
    assert torch.equal(out.isnan().all(1), torch.tensor([False, False, True, False], device=device))
    assert not out[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize(("name", "device"), NAMES)
@every_level
def test_a_block_of_zeros(name: str, device: str, dual_level: bool) -> None:
    problem = build(LinearCase("zeros", 1024, dual_level=dual_level), torch.float32, device)
    problem.x[:, :512] = 0
    problem.x[0] = 0
    out = mx_linear(problem.x, problem.weight, implementation=name, **problem.options)
    check_linear(out, problem)
    assert problem.bias is not None
    assert torch.equal(out[0], problem.bias)


@pytest.mark.parametrize(("name", "device"), NAMES)
@every_level
def test_fake_agrees_with_the_real_op(name: str, device: str, dual_level: bool) -> None:
    problem = build(LinearCase("fake", leading=(2, 5), dual_level=dual_level), torch.bfloat16, device)
    real = mx_linear(problem.x, problem.weight, implementation=name, **problem.options)
    with FakeTensorMode() as mode:
        tensors = {key: None if t is None else mode.from_tensor(t) for key, t in vars(problem.weight).items() if key != "in_features"}
        options = {key: None if t is None else mode.from_tensor(t) for key, t in problem.options.items()}
        weight = MXWeight(problem.weight.in_features, **tensors)
        fake = mx_linear(mode.from_tensor(problem.x), weight, implementation=name, **options)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize(("name", "device"), NAMES)
@every_level
def test_opcheck(name: str, device: str, dual_level: bool) -> None:
    problem = build(LinearCase("opcheck", mul_scale=True, dual_level=dual_level), torch.float32, device)
    weight = problem.weight
    arguments = (problem.x, weight.packed, weight.scale, weight.dual_scale, problem.bias, problem.mul_scale, name)
    torch.library.opcheck(torch.ops.ditattn.mx_linear.default, arguments)


@every_level
def test_compiles_into_one_graph(dual_level: bool) -> None:
    problem = build(LinearCase("compiled", dual_level=dual_level), torch.float32)
    compiled = torch.compile(lambda x: mx_linear(x, problem.weight, bias=problem.bias), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(problem.x), mx_linear(problem.x, problem.weight, bias=problem.bias))


@pytest.mark.skipif(not torch.amp.is_autocast_available("cpu"), reason="no autocast")
def test_autocast_leaves_the_op_alone() -> None:
    problem = build(LinearCase("autocast"), torch.float32)
    expected = mx_linear(problem.x, problem.weight, **problem.options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mx_linear(problem.x, problem.weight, **problem.options), expected)


@every_level
def test_many_rows_are_handled_a_few_at_a_time(dual_level: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes, whatever the number of rows that fit, and results as good."""
    case = LinearCase("chunks", 96, 50, (33,), dual_level=dual_level)
    whole = build(case, torch.float32)
    monkeypatch.setattr("ditattn.ops.mx_linear.mx_format.CHUNK", 1000)
    problem = build(case, torch.float32)
    assert torch.equal(problem.weight.packed, whole.weight.packed)
    assert torch.equal(problem.weight.scale, whole.weight.scale)
    check_linear(mx_linear(problem.x, problem.weight, **problem.options), problem)


def test_no_temporary_is_as_large_as_the_weight() -> None:
    """2048 x 8192 in float32 are 64 MiB; what is made floating at once is 16."""
    from largest_tensor import LargestTensor

    weight = quantized_weight(torch.randn(2048, 8192).bfloat16())
    x = torch.randn(3, 8192)
    with LargestTensor() as largest:
        mx_linear(x, weight)
    assert largest.num_bytes <= 4 * 2**22


@every_level
def test_bits_of_a_weight(dual_level: bool) -> None:
    weight = quantized_weight(torch.randn(64, 1024), dual_level=dual_level)
    assert weight.num_bytes() * 8 / (64 * 1024) == 4.25 + (32 / 512 if dual_level else 0)
    again = copy.deepcopy(weight)
    assert torch.equal(again.packed, weight.packed)
    assert again.packed.data_ptr() != weight.packed.data_ptr()
    assert arranged(weight) is weight


WEIGHT = quantized_weight(torch.ones(8, 96))
DUAL_WEIGHT = quantized_weight(torch.ones(8, 96), dual_level=True)
X = torch.ones(2, 96)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: mx_linear(torch.ones(2, 95), WEIGHT), r"x must be \[..., 96\] for this weight, not \[2, 95\]"),
        (lambda: mx_linear(torch.ones(()), WEIGHT), r"x must be \[..., 96\]"),
        (lambda: mx_linear(X, WEIGHT.packed), "weight must be a MXWeight"),
        (lambda: mx_linear(X, WEIGHT, bias=torch.ones(7)), r"bias must be floating \[8\], not torch.float32 \[7\]"),
        (lambda: mx_linear(X, WEIGHT, mul_scale=torch.ones(96).half()), r"mul_scale must be torch.float32 \[96\]"),
        (lambda: mx_linear(X, replace(WEIGHT, scale=WEIGHT.scale[:, :-1])), r"weight.scale must be torch.uint8 \[8, 4\]"),
        (lambda: mx_linear(X, replace(WEIGHT, packed=WEIGHT.packed.view(torch.int8))), "weight.packed must be torch.uint8"),
        (lambda: mx_linear(X, replace(DUAL_WEIGHT, dual_scale=torch.ones(2, 8))), r"weight.dual_scale must be torch.float32 \[1, 8\]"),
        (lambda: mx_linear(X.to("meta"), WEIGHT), "weight.packed must be on meta as x is"),
        (lambda: mx_linear(X.double(), WEIGHT), r"no implementation takes this call \(cpu, float64, 96 input features\)"),
        (lambda: mx_linear(X, WEIGHT, implementation="fast"), "no implementation named 'fast'"),
    ],
)
def test_bad_calls_say_what_is_wrong(call: object, text: str) -> None:
    with pytest.raises(UnsupportedCall, match=text):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["ascend_mx", "ascend_dual_level"])
def test_what_this_machine_lacks_is_unavailable(name: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"runs on npu, not on cpu\. Possible here: torch, reference"):
        mx_linear(X, DUAL_WEIGHT, implementation=name)


def test_the_check_sees_a_wrong_result() -> None:
    """The judge is no formality: one scale off by one step is noticed."""
    problem = build(LinearCase("wrong", 128), torch.float32)
    scale = problem.weight.scale.clone()
    scale[0, 1] += 1
    out = mx_linear(problem.x, replace(problem.weight, scale=scale), **problem.options)
    with pytest.raises(AssertionError, match="times what is allowed"):
        linear_calls.check_linear(out, problem)
