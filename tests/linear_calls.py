"""Linear layers for tests: cases, and how a result is judged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from ditattn.ops.mx_linear import MXWeight, quantized_weight
from ditattn.ops.mx_linear.call import LinearCall
from ditattn.ops.mx_linear.reference import decoded_weight, rounded, rounded_dual

FACTOR = 1.5


@dataclass(frozen=True)
class LinearCase:
    """A layer and its input, drawn by a seed. `in_features` that are no multiple of 32 or 512 are the point of most."""

    name: str
    in_features: int = 96
    out_features: int = 48
    leading: tuple[int, ...] = (7,)
    bias: bool = True
    mul_scale: bool = False
    dual_level: bool = False

    def __str__(self) -> str:
        return self.name + (", dual level" if self.dual_level else "")


_PLAIN = (
    LinearCase("whole blocks", 128),
    LinearCase("one value", 1, 1, (1,)),
    LinearCase("in is no multiple of 32", 50),
    LinearCase("in is a multiple of 32, not of 64", 96),
    LinearCase("in is no multiple of 512", 1056, 32),
    LinearCase("two large blocks", 1024, 40),
    LinearCase("no bias", bias=False),
    LinearCase("smoothed", 560, mul_scale=True),
    LinearCase("no leading axis", leading=()),
    LinearCase("three leading axes", leading=(2, 3, 5)),
    LinearCase("no tokens", leading=(2, 0)),
)
CASES = (*_PLAIN, *(LinearCase(**{**vars(case), "dual_level": True}) for case in _PLAIN))


@dataclass(frozen=True)
class LinearProblem:
    """What a case draws."""

    x: Tensor
    weight: MXWeight
    bias: Tensor | None
    mul_scale: Tensor | None

    @property
    def options(self) -> dict[str, Tensor | None]:
        return {"bias": self.bias, "mul_scale": self.mul_scale}

    def call(self) -> LinearCall:
        return LinearCall(self.x.reshape(-1, self.x.shape[-1]), self.weight, self.bias, self.mul_scale)


def build(case: LinearCase, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> LinearProblem:
    """Values of very different sizes from block to block, so that a scale in a wrong place is seen."""
    generator = torch.Generator().manual_seed(seed)

    def spread(*shape: int) -> Tensor:
        blocks = -(-shape[-1] // 32)
        sizes = torch.exp2(torch.randint(-4, 5, (*shape[:-1], blocks), generator=generator).float())
        return torch.randn(*shape, generator=generator) * sizes.repeat_interleave(32, dim=-1)[..., : shape[-1]]

    x = spread(*case.leading, case.in_features).to(dtype)
    weight = quantized_weight((spread(case.out_features, case.in_features) / 8).to(dtype).to(device), dual_level=case.dual_level)
    bias = torch.randn(case.out_features, generator=generator).to(dtype).to(device) if case.bias else None
    mul_scale = (0.25 + torch.rand(case.in_features, generator=generator)).to(device) if case.mul_scale else None
    return LinearProblem(x.to(device), weight, bias, mul_scale)


def operands(problem: LinearProblem) -> tuple[Tensor, Tensor]:
    """x and the weight as they are rounded, float64."""
    x = problem.call().scaled_x()
    return (rounded(x) if problem.weight.dual_scale is None else rounded_dual(x)), decoded_weight(problem.weight)


def exact(problem: LinearProblem) -> Tensor:
    """float64 `[tokens, N]` of the rounded operands."""
    x, weight = operands(problem)
    return x @ weight.T + (0 if problem.bias is None else problem.bias.double())


def check_linear(out: Tensor, problem: LinearProblem) -> None:
    """Shape and dtype, and an error of at most FACTOR times that of torch's linear on the rounded operands."""
    expected = exact(problem)
    assert out.shape == (*problem.x.shape[:-1], problem.weight.out_features)
    assert out.dtype == problem.x.dtype
    assert out.is_contiguous()
    x, weight = operands(problem)
    plain = linear(x.to(out.dtype), weight.to(out.dtype), problem.bias)
    error = (out.flatten().double() - expected.flatten()).abs()
    magnitude = (x.abs() @ weight.abs().T + (0 if problem.bias is None else problem.bias.double().abs())).flatten()
    # float32 sums of as many products as there are, and the rounding of the result
    allowed = 2**-24 * (8 + x.shape[-1] ** 0.5) * magnitude + torch.finfo(out.dtype).eps * expected.flatten().abs()
    assert (error <= allowed).all(), f"{(error / allowed).max():.2f} times what is allowed"
    if error.numel():
        theirs = (plain.flatten().double() - expected.flatten()).norm()
        floor = torch.finfo(out.dtype).eps / 4 * expected.norm()
        assert error.norm() <= FACTOR * theirs + floor
