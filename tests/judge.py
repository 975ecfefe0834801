"""How a result is judged: against the float64 oracle, in proportion to torch's own attention on the same problem in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import oracle
from cases import Case, Problem
from ditattn.ops.table import CallFacts, Implementation
from ditattn.plan.block_plan import BLOCK_SIZE

FACTOR = 1.5

# These take many seconds to compile for every new kind of call; a file of their own tests them on a few.
COMPILED_PER_SHAPE = {"flex"}

# One element may be this many times worse than the worst element of torch's result: catches a wrong element that a norm over the whole
# tensor would drown.
ELEMENT_FACTOR = 8


def facts_of(case: Case, device: str, dtype: torch.dtype, *, lse: bool = False) -> CallFacts:
    """What the op's table is asked for this case."""
    needs = {
        "causal": case.causal,
        "key_lengths": case.key_lengths is not None,
        "attn_mask": case.mask is not None,
        "gqa": case.heads != case.key_heads,
        "unequal_lengths": case.query_length != case.key_length,
        "lse": lse,
        "tail": case.tail,
        "other_block_size": case.plan is not None and case.block_size != BLOCK_SIZE,
    }
    needed = frozenset(name for name, flag in needs.items() if flag)
    return CallFacts(device, dtype, case.dim, needed, case.heads // case.key_heads, case.key_length)


def possible(table: tuple[Implementation, ...], facts: CallFacts) -> list[str]:
    """Names of the implementations that take the call on this machine, and that the generated contract tests run."""
    # not `explain`, which measures which of two is faster: what can run is asked at collection, by every process and for every kind of call
    return [row.name for row in table if row.name not in COMPILED_PER_SHAPE and row.refusal(facts) is None]


# implementations that follow each other on a problem are judged by the same numbers
once = lru_cache(maxsize=4)


@once
def rounding_floor(problem: Problem) -> float:
    """Relative error that no implementation can promise to stay below, whatever torch's luck on one small problem.

    A logit is known to half a unit in its last fp32 place, which moves its weight by that much times the logit; a few such units are
    allowed. Half types round the weights and the output as well: a twentieth of their unit covers a lucky rounding of torch's.
    """
    largest = _largest_score(problem, lambda x: x)
    unit = torch.finfo(problem.query.dtype).eps / 2
    half = 0.0 if problem.query.dtype == torch.float32 else 0.05 * unit
    return 2**-24 * max(4.0, largest) + half


def _largest_score(problem: Problem, first: Callable[[Tensor], Tensor]) -> float:
    """Of all scaled scores, whose elements go through a function before they are multiplied: by magnitude."""
    scale = 1 / math.sqrt(problem.query.shape[3]) if problem.scale is None else problem.scale
    group = problem.query.shape[2] // problem.key.shape[2]
    query, key = first(problem.query.double()), first(problem.key.double()).repeat_interleave(group, dim=2)
    return torch.einsum("bshd,bthd->bhst", query, key).abs().max().item() * abs(scale)


@once
def torch_result(problem: Problem) -> Tensor:
    """SDPA on the same problem; rows that see no key are zero, as the contract says."""
    seen = oracle.visible(problem.query, problem.key, attn_mask=problem.attn_mask, plan=problem.plan, **_without_scale(problem))
    mask: Tensor | None = None if bool(seen.all()) else seen
    if problem.attn_mask is not None and problem.attn_mask.dtype != torch.bool:
        mask = problem.attn_mask.expand(seen.shape).masked_fill(~seen, -torch.inf)
    tensors = (problem.query, problem.key, problem.value)
    if problem.query.device.type == "cuda":
        # torch's kernels there read beside views that are not aligned
        tensors = tuple(x.contiguous() for x in tensors)
    q, k, v = (x.transpose(1, 2) for x in tensors)
    if problem.tail is not None:
        seen = mask = torch.cat([seen, _stand_ins(problem)], dim=-1)
        k, v = (torch.cat([x, _repeated(mean, problem)], dim=2) for x, mean in ((k, problem.tail.key), (v, problem.tail.value)))
    gqa = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=problem.scale, enable_gqa=gqa)
    return torch.where(seen.any(-1, keepdim=True), out, 0).transpose(1, 2)


def _repeated(mean: Tensor, problem: Problem) -> Tensor:
    """`[B, G, T, D]`: in the place of every key the mean of its block, for which n tokens are n times the weight."""
    assert problem.plan is not None
    return mean.to(problem.query.dtype).repeat_interleave(problem.plan.block_size, dim=1)[:, : problem.plan.key_length].transpose(1, 2)


def _stand_ins(problem: Problem) -> Tensor:
    """bool `[B, H, S, T]`: real keys of dropped blocks."""
    dropped = ~oracle.token_mask(problem.plan, problem.query.shape[0], problem.query.shape[2]).to(problem.query.device)
    return dropped & oracle.visible(problem.query, problem.key, key_lengths=problem.key_lengths)


def _without_scale(problem: Problem) -> dict[str, object]:
    return {name: value for name, value in problem.options.items() if name != "scale"}


@once
def exact_result(problem: Problem) -> tuple[Tensor, Tensor]:
    """The oracle's output and log-sum-exp."""
    options = {"attn_mask": problem.attn_mask, "plan": problem.plan, "tail": problem.tail, **problem.options}
    return oracle.attention(problem.query, problem.key, problem.value, **options)


@dataclass(frozen=True)
class Coarser:
    """The dtype that an implementation declares to compute in, and how many numbers of it stand for one of the inputs'."""

    dtype: torch.dtype
    parts: int

    def rounded(self, x: Tensor) -> Tensor:
        """One part has the coarser dtype, several are a sum in the input's own."""
        if self.parts == 1:
            return x.to(self.dtype)
        total = torch.zeros_like(x)
        for _ in range(self.parts):
            total = total + (x - total).to(self.dtype).to(x.dtype)
        return total

    @property
    def factor(self) -> float:
        """Products of parts leave out some that are as large as what rounding the inputs to parts leaves out."""
        return FACTOR if self.parts == 1 else 2 * FACTOR


def check_output(out: Tensor, problem: Problem, computes_in: Coarser | None = None) -> None:
    """Shape, dtype, layout, and error against the oracle: in norm and element by element.

    An implementation that declares a coarser dtype to compute in is compared with torch on inputs rounded to that dtype.
    """
    exact, lse = exact_result(problem)
    assert out.shape == problem.query.shape
    assert out.dtype == problem.query.dtype
    assert out.is_contiguous()
    assert not out.isnan().any(), "NaN came in from outside the views"
    blind = lse.isneginf().transpose(1, 2)
    assert bool((out[blind] == 0).all()), "a row without keys must be zero"
    yardstick = problem if computes_in is None else rounded(problem, computes_in)
    theirs = torch_result(yardstick)
    floor = rounding_floor(yardstick)
    factor = FACTOR if computes_in is None else computes_in.factor
    error, allowed = relative_error(out, exact), factor * relative_error(theirs, exact) + floor
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"
    size = exact.abs().max()
    worst, worst_allowed = (out - exact).abs().max(), ELEMENT_FACTOR * ((theirs - exact).abs().max() + floor * size)
    assert worst <= worst_allowed, f"worst element is off by {worst:.2e}, allowed {worst_allowed:.2e}"


@once
def rounded(problem: Problem, coarser: Coarser) -> Problem:
    """The same problem with its tensors rounded to a coarser dtype, or to parts in it."""
    tensors = {name: coarser.rounded(getattr(problem, name)) for name in ("query", "key", "value")}
    tail = problem.tail
    if tail is not None:
        tail = replace(tail, key=coarser.rounded(tail.key).float(), value=coarser.rounded(tail.value).float())
    return replace(problem, **tensors, tail=tail)


@once
def _with_rounded_means(problem: Problem, coarser: Coarser) -> Problem:
    assert problem.tail is not None
    return replace(problem, tail=replace(problem.tail, key=coarser.rounded(problem.tail.key).float()))


def coarser(table: tuple[Implementation, ...], name: str) -> Coarser | None:
    """What the named row declares to compute in."""
    row = next(row for row in table if row.name == name)
    return None if row.computes_in is None else Coarser(getattr(torch, row.computes_in), row.parts)


def eps(table: tuple[Implementation, ...], name: str, dtype: torch.dtype) -> float:
    """The distance from 1 to the next number that the named row can tell from it, where it takes tensors of a dtype."""
    declared = coarser(table, name)
    own = torch.finfo(dtype).eps
    return own if declared is None else max(own, torch.finfo(declared.dtype).eps * 2.0 ** (-8 * (declared.parts - 1)))


def check_lse(lse: Tensor, problem: Problem, computes_in: Coarser | None = None) -> None:
    """fp32 `[B, H, S]`, -inf exactly where no key is seen."""
    exact = exact_result(problem)[1]
    assert lse.shape == exact.shape
    assert lse.dtype == torch.float32
    blind = exact.isneginf()
    assert torch.equal(lse.isneginf(), blind)
    # half types may sum weights of their own precision: a relative error e of the sum is an absolute error e of the logarithm. Parts lose
    # as much of every product as their last bit, in one direction at worst
    own = computes_in or Coarser(problem.query.dtype, 1)
    slack = 0.0 if own.dtype == torch.float32 else 2e-4
    if own.parts > 1:
        slack = 2.0 ** (-9 * own.parts) * _largest_score(problem, torch.abs)
    elif computes_in is not None:
        slack += (exact_result(rounded(problem, computes_in))[1] - exact)[~blind].abs().max().item() if bool((~blind).any()) else 0.0
    if problem.tail is not None and own.dtype != torch.float32 and bool((~blind).any()):
        # the means may be multiplied in the call's dtype
        slack += (exact_result(_with_rounded_means(problem, own))[1] - exact)[~blind].abs().max().item()
    error = (lse - exact)[~blind].abs()
    if error.numel():
        allowed = 4 * rounding_floor(problem) + 2**-22 * exact[~blind].abs() + slack
        assert bool((error <= allowed).all()), f"log-sum-exp is off by up to {error.max():.2e}"


def relative_error(out: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact result; absolute where the exact result is zero."""
    size = exact.norm().item()
    return (out.double() - exact).norm().item() / (size or 1.0)
