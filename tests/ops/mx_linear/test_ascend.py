"""The steps around Ascend's MXFP4 operators, against stand-ins that follow their documentation; and mistakes that must be noticed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ascend_linear_operators as operators
from ditattn.ops.ascend import Operator
from ditattn.ops.mx_linear import ascend, quantized_weight
from ditattn.ops.mx_linear.call import LinearCall, LinearFacts
from ditattn.ops.mx_linear.mx_format import level0_scale
from linear_calls import CASES, LinearCase, LinearProblem, build, check_linear

# the operators take no empty tensors, and the op hands none on
TAKEN = [case for case in CASES if 0 not in case.leading]
PROVIDERS = {False: ascend.PLAIN, True: ascend.DUAL_LEVEL}
# as many tokens as output features, so that operands of the two could be exchanged
SQUARE = {dual_level: LinearCase("square", 1056, 48, (48,), mul_scale=True, dual_level=dual_level) for dual_level in (False, True)}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Operator, "load", lambda self: operators.KERNELS[self.names[0]])
    package = SimpleNamespace(float4_e2m1fn_x2=operators.FLOAT4_E2M1, float8_e8m0fnu=operators.FLOAT8_E8M0)
    monkeypatch.setitem(sys.modules, "torch_npu", package)


def run(problem: LinearProblem) -> torch.Tensor:
    provider = PROVIDERS[problem.weight.dual_scale is not None]
    return provider.run(problem.call()).reshape(*problem.x.shape[:-1], -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_values(case: LinearCase, dtype: torch.dtype) -> None:
    problem = build(case, dtype)
    check_linear(run(problem).contiguous(), problem)


@pytest.mark.parametrize("dual_level", [False, True])
def test_the_stand_ins_round_as_this_package_does(dual_level: bool) -> None:
    """Two programs of one format: weights and activations come from either."""
    weight = build(SQUARE[dual_level], torch.bfloat16).x
    ours = quantized_weight(weight, dual_level=dual_level)
    padded = torch.nn.functional.pad(weight, (0, 32))
    packed, *scales = operators.dynamic_dual_level_mx_quant(padded) if dual_level else operators.dynamic_mx_quant(padded)
    assert torch.equal(packed, ours.packed)
    assert torch.equal(scales[-1].flatten(1), ours.scale)
    if dual_level:
        assert torch.equal(scales[0], level0_scale(weight))


def test_a_weight_that_stays_is_cast_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = build(SQUARE[True], torch.bfloat16)
    monkeypatch.setattr(ascend.DualLevel, "machine", lambda self: None)
    monkeypatch.setattr(ascend.DualLevel, "probe", lambda self: None)
    kept = ascend.arranged(problem.weight)
    assert kept.packed.dtype == torch.int8
    assert ascend.arranged(kept) is kept
    monkeypatch.setattr(ascend, "_fractal", lambda packed: pytest.fail("cast again"))
    moved = replace(problem, weight=kept)
    check_linear(run(moved), problem)
    plain = quantized_weight(torch.ones(4, 64))
    assert ascend.arranged(plain) is plain


def test_what_the_dual_level_product_does_not_take() -> None:
    assert "takes weights with level-0 scales" in str(ascend.DUAL_LEVEL.limits(LinearFacts("npu", torch.bfloat16, 64)))
    assert ascend.DUAL_LEVEL.limits(LinearFacts("npu", torch.bfloat16, 64, frozenset({"dual_scale"}))) is None


# --- mistakes ---------------------------------------------------------------------------------------------------------------------------

Change = Callable[[list[Any], dict[str, Any]], None]


def swapped(first: int, second: int) -> Change:
    def change(arguments: list[Any], options: dict[str, Any]) -> None:
        arguments[first], arguments[second] = arguments[second], arguments[first]

    return change


def argument(place: int, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(arguments: list[Any], options: dict[str, Any]) -> None:
        arguments[place] = make(arguments[place])

    return change


def option(name: str, make: Callable[[Any], Any]) -> Change:
    return lambda arguments, options: options.update({name: make(options[name])})


def high_nibble_first(packed: torch.Tensor) -> torch.Tensor:
    bytes_ = packed.view(torch.uint8)
    return ((bytes_ >> 4) | (bytes_ << 4)).view(packed.dtype)


def wrong_nibbles_in_place(packed: torch.Tensor) -> torch.Tensor:
    # where the format cast is remembered by address
    return packed.copy_(high_nibble_first(packed.clone()))


def of_64_values(pairs: torch.Tensor) -> torch.Tensor:
    """The first exponent of a pair for both blocks: blocks of 64."""
    return pairs[..., :1].expand_as(pairs).contiguous()


X1, X2, L0_X1, L0_X2, L1_X1, L1_X2 = range(6)
DUAL_MISTAKES: dict[str, Change] = {
    "level-1 scales swapped": swapped(L1_X1, L1_X2),
    "level-0 scales swapped": swapped(L0_X1, L0_X2),
    "levels of x swapped": swapped(L0_X1, L1_X1),
    "level-0 scales of the weight not transposed": argument(L0_X2, lambda scale: scale.T.contiguous()),
    "level-0 scales of the weight read in the wrong order": argument(L0_X2, lambda scale: scale.T.contiguous().view_as(scale)),
    "not in FRACTAL_NZ": argument(X2, torch.clone),
    "the later value in the low bits": argument(X2, wrong_nibbles_in_place),
    "blocks of 64 values": argument(L1_X2, of_64_values),
    "blocks of 64 values in x": argument(L1_X1, of_64_values),
    "large blocks of 1024 values": argument(L0_X1, lambda scale: scale[:, :1].expand_as(scale).contiguous()),
    "exponents not in pairs": argument(L1_X2, lambda pairs: pairs.flatten(1)),
    "no bias": option("bias", lambda bias: None),
    "a bias in bf16": option("bias", torch.Tensor.bfloat16),
    "output in float32": option("output_dtype", lambda dtype: torch.float32),
}
PLAIN_MISTAKES: dict[str, Change] = {
    "the scales of x and of the weight swapped": lambda arguments, options: (
        arguments.__setitem__(2, options["pertoken_scale"].transpose(0, 1)),
        options.update(pertoken_scale=arguments[2].transpose(0, 1)),
    )[1],
    "the weight not transposed": argument(1, lambda weight: weight.T),
    "the weight copied": argument(1, torch.Tensor.contiguous),
    "the weight's scale not transposed": argument(2, lambda scale: scale.transpose(0, 1)),
    "the later value in the low bits": argument(1, lambda weight: high_nibble_first(weight.T).T),
    "blocks of 64 values": argument(2, of_64_values),
    "blocks of 128 values asked for": option("group_sizes", lambda sizes: [1, 1, 128]),
    "no bias": option("bias", lambda bias: None),
    "output in float32": option("output_dtype", lambda dtype: torch.float32),
}
MISTAKES = [(dual_level, name) for dual_level, mistakes in ((False, PLAIN_MISTAKES), (True, DUAL_MISTAKES)) for name in mistakes]


@pytest.mark.parametrize(("dual_level", "mistake"), MISTAKES, ids=[f"{'dual level' if d else 'plain'}: {name}" for d, name in MISTAKES])
def test_a_mistake_is_noticed(dual_level: bool, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = build(SQUARE[dual_level], torch.bfloat16)
    change = (DUAL_MISTAKES if dual_level else PLAIN_MISTAKES)[mistake]
    name = PROVIDERS[dual_level].operator.names[0]
    kernel = operators.KERNELS[name]

    def mistaken(*arguments: Any, **options: Any) -> torch.Tensor:
        given = list(arguments)
        # swapped square operands must not be told apart by their order in memory
        change(given, options)
        return kernel(*given, **options)

    monkeypatch.setitem(operators.KERNELS, name, mistaken)
    with pytest.raises((AssertionError, RuntimeError)):
        check_linear(run(problem).contiguous(), problem)


@pytest.mark.parametrize("dual_level", [False, True])
def test_a_mul_scale_left_out_is_noticed(dual_level: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = build(SQUARE[dual_level], torch.bfloat16)
    found = run(problem).contiguous()
    check_linear(found, problem)
    monkeypatch.setattr(LinearCall, "scaled_x", lambda self: self.x)
    without = run(problem).contiguous()
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        check_linear(without, problem)


@pytest.mark.parametrize("dual_level", [False, True])
def test_features_that_are_not_padded_are_noticed(dual_level: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = build(SQUARE[dual_level], torch.bfloat16)
    monkeypatch.setattr(ascend, "padded_features", lambda features: features)
    with pytest.raises((AssertionError, RuntimeError)):
        check_linear(run(problem).contiguous(), problem)
