"""Named attention problems. Every tensor is a view into a larger buffer that is NaN wherever the view does not reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ditattn.ops.pooled_tail import PooledTail
from ditattn.plan.block_plan import BLOCK_SIZE, BlockPlan, num_blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", *(["cuda"] if torch.cuda.is_available() else []))


@dataclass(frozen=True)
class Case:
    """A problem by its shape, data and options; `build` makes the tensors."""

    name: str
    batch: int = 1
    query_length: int = 300
    key_length: int = 300
    heads: int = 2
    key_heads: int = 2
    dim: int = 64
    data: str = "random"
    layout: str = "padded"
    plan: str | None = None
    plan_batch: int | None = None
    plan_heads: int | None = None
    block_size: int = BLOCK_SIZE
    scale: float | None = None
    causal: bool = False
    key_lengths: tuple[int, ...] | None = None
    mask: str | None = None
    tail: bool = False

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Problem:
    """Tensors and options of one call. Query `[B, S, H, D]`, key and value `[B, T, G, D]`. Nothing writes to them once it was judged."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None
    causal: bool
    key_lengths: Tensor | None
    attn_mask: Tensor | None
    plan: BlockPlan | None
    tail: PooledTail | None = None

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of both ops; the dense one also takes `attn_mask`, the sparse one `plan` and `tail`."""
        return {"scale": self.scale, "causal": self.causal, "key_lengths": self.key_lengths}


# --- data: (query, key, value) in float64, [B, S, H, D] ---------------------------------------------------------------------------------


def _large_logits(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return 10 * q, 10 * k, v


def _shifted(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, k + 3, v + 5


def _rising_norms(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every key block raises the running maximum."""
    return q, k * torch.linspace(0.1, 10, k.shape[1], dtype=k.dtype).view(1, -1, 1, 1), v


def _negative_logits(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every logit is below -100 at head size 64: padding with logit 0 that entered a maximum would erase the row."""
    return q.abs() + 2, -4 * (k.abs() + 2), v


DATA: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "random": lambda q, k, v: (q, k, v),
    "large logits": _large_logits,
    "shifted": _shifted,
    "rising norms": _rising_norms,
    "negative logits": _negative_logits,
}


# --- layouts: a view `[B, S, H, D]` of a NaN buffer, filled with x ----------------------------------------------------------------------


def _padded(x: Tensor) -> Tensor:
    """Tokens and heads cut out of a larger contiguous tensor."""
    batch, length, heads, dim = x.shape
    return x.new_full((batch, length + 7, heads + 1, dim), torch.nan)[:, 3 : 3 + length, 1:]


def _transposed(x: Tensor) -> Tensor:
    """`[B, H, S, D]` in memory."""
    batch, length, heads, dim = x.shape
    return x.new_full((batch, heads, length + 5, dim), torch.nan)[:, :, 2 : 2 + length].transpose(1, 2)


def _interleaved(x: Tensor) -> Tensor:
    """As one of three tensors of a fused projection `[B, S, 3, H, D]`."""
    batch, length, heads, dim = x.shape
    return x.new_full((batch, length, 3, heads, dim), torch.nan)[:, :, 1]


def _odd(x: Tensor) -> Tensor:
    """Odd strides and a base that is aligned to one element only."""
    batch, length, heads, dim = x.shape
    return x.new_full((batch, length + 1, heads, dim + 5), torch.nan)[:, 1:, :, 3 : 3 + dim]


def _sparse_last_axis(x: Tensor) -> Tensor:
    """Every second element of the last axis."""
    return x.new_full((*x.shape[:3], 2 * x.shape[3]), torch.nan)[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "padded": _padded,
    "transposed": _transposed,
    "interleaved": _interleaved,
    "odd strides": _odd,
    "last axis strided": _sparse_last_axis,
}


# --- plans: bool block mask `[B', H', M, N]` --------------------------------------------------------------------------------------------


def _random_rows(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A quarter of the blocks, at least one per row."""
    scores = torch.rand(shape, generator=generator)
    kept = max(1, shape[-1] // 4)
    return scores >= scores.topk(kept, dim=-1).values[..., -1:]


def _uneven_rows(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """From empty to full, varying over heads and rows."""
    rows = torch.arange(shape[0] * shape[1] * shape[2]).view(*shape[:3], 1) % (shape[3] + 1)
    return torch.rand(shape, generator=generator).argsort(-1).argsort(-1) < rows


PLANS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "random": _random_rows,
    "uneven": _uneven_rows,
    "empty": lambda shape, _: torch.zeros(shape, dtype=torch.bool),
    "full": lambda shape, _: torch.ones(shape, dtype=torch.bool),
    "first block": lambda shape, _: torch.arange(shape[3]).expand(shape) == 0,
    "last block": lambda shape, _: torch.arange(shape[3]).expand(shape) == shape[3] - 1,
}


# --- masks for dense calls --------------------------------------------------------------------------------------------------------------


def _mask(kind: str, case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    shape = (case.batch, 1, case.query_length, case.key_length)
    keep = torch.rand(shape, generator=generator) < 0.5
    keep[..., 0] = True
    if kind == "bool":
        return keep
    if kind == "bool per key":
        return keep[:, :, :1].contiguous()
    assert kind == "additive"
    return torch.randn(shape, generator=generator).to(dtype).masked_fill(~keep, -torch.inf)


# --- building ---------------------------------------------------------------------------------------------------------------------------


def build(case: Case, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """The case's tensors. The same case gives the same numbers (rounded to `dtype`) every time."""
    generator = torch.Generator().manual_seed(1234 + case.query_length * 7 + case.key_length)

    def draw(length: int, heads: int) -> Tensor:
        return torch.randn(case.batch, length, heads, case.dim, generator=generator, dtype=torch.float64)

    drawn = draw(case.query_length, case.heads), draw(case.key_length, case.key_heads), draw(case.key_length, case.key_heads)
    query, key, value = (_placed(x, case.layout, dtype, device) for x in DATA[case.data](*drawn))
    lengths = None if case.key_lengths is None else torch.tensor(case.key_lengths, device=device)
    mask = None if case.mask is None else _mask(case.mask, case, dtype, generator).to(device)
    plan = None if case.plan is None else _plan(case, generator, device)
    tail = PooledTail.of(key, value, None, lengths, case.block_size) if case.tail else None
    return Problem(query, key, value, case.scale, case.causal, lengths, mask, plan, tail)


@lru_cache(maxsize=4)
def shared(case: Case, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """`build`, once for the implementations that follow each other on a case; what is exact is then computed once, too."""
    return build(case, dtype, device)


def _placed(x: Tensor, layout: str, dtype: torch.dtype, device: str) -> Tensor:
    x = x.to(dtype).to(device)
    return LAYOUTS[layout](x).copy_(x)


def _plan(case: Case, generator: torch.Generator, device: str) -> BlockPlan:
    assert case.plan is not None
    rows, columns = num_blocks(case.query_length, case.block_size), num_blocks(case.key_length, case.block_size)
    shape = (case.plan_batch or case.batch, case.plan_heads or case.heads, rows, columns)
    mask = PLANS[case.plan](shape, generator)
    plan = BlockPlan.from_mask(mask.to(device), case.query_length, case.key_length, case.block_size)
    plan.check(case.batch, case.heads)
    return plan


# --- the cases --------------------------------------------------------------------------------------------------------------------------

_SHAPES = (
    *(Case(f"data: {data}", data=data) for data in DATA),
    *(Case(f"data: {data}, head size 128", data=data, dim=128, query_length=390, key_length=390) for data in DATA),
    *(Case(f"layout: {layout}", layout=layout) for layout in LAYOUTS),
    *(Case(f"layout: {layout}, head size 128", layout=layout, dim=128, batch=2) for layout in ("transposed", "odd strides")),
    *(Case(f"length {n}", query_length=n, key_length=n) for n in (1, 2, 5, 63, 64, 65, 127, 128, 129, 190, 256, 383)),
    *(Case(f"lengths {s} and {t}", query_length=s, key_length=t) for s, t in ((1, 300), (300, 1), (40, 700), (390, 130), (129, 257))),
    *(Case(f"head size {d}", dim=d) for d in (32, 72, 80, 88, 96, 128, 256)),
    Case("batch of 2", batch=2),
    Case("one head", heads=1, key_heads=1),
    Case("grouped heads 6 to 2", heads=6, key_heads=2),
    Case("grouped heads 4 to 1, batch of 2, transposed", batch=2, heads=4, key_heads=1, layout="transposed"),
    Case("scale 0.02", scale=0.02),
    Case("scale -0.3, causal", scale=-0.3, causal=True),
    Case("scale 0, causal", scale=0.0, causal=True),
    Case("scale -0.3, key lengths", scale=-0.3, batch=2, key_lengths=(65, 290)),
    Case("causal", causal=True),
    Case("causal, more keys than queries", causal=True, query_length=200, key_length=300),
    Case("causal, more queries than keys", causal=True, query_length=300, key_length=200),
    Case("causal, grouped heads, large logits", causal=True, heads=4, data="large logits"),
    Case("key lengths", batch=4, key_lengths=(300, 129, 128, 1)),
    Case("key lengths with 0", batch=3, key_lengths=(0, 300, 7)),
    Case("key lengths, causal", batch=2, key_lengths=(65, 290), causal=True),
    Case("key lengths, negative logits", batch=2, key_lengths=(65, 290), data="negative logits"),
)

DENSE_CASES = (
    *_SHAPES,
    Case("bool mask", mask="bool"),
    Case("bool mask per key", batch=2, mask="bool per key"),
    Case("additive mask", mask="additive"),
    Case("additive mask, causal", mask="additive", causal=True),
    Case("bool mask, key lengths, grouped heads", batch=2, mask="bool", key_lengths=(300, 17), heads=4),
)

SPARSE_CASES = (
    *(replace(case, plan="random" if case.key_length > 256 else "uneven") for case in _SHAPES),
    *(Case(f"plan: {plan}", plan=plan, query_length=390, key_length=517) for plan in PLANS),
    *(Case(f"plan: {plan}, batch of 2, grouped heads", plan=plan, batch=2, heads=4, query_length=390) for plan in ("uneven", "empty")),
    Case("plan shared by batch and heads", plan="uneven", batch=2, plan_batch=1, plan_heads=1, query_length=390, key_length=390),
    Case("plan shared by heads", plan="uneven", batch=2, plan_heads=1, query_length=390, key_length=390),
    Case("plan shared by batch", plan="uneven", batch=2, plan_batch=1, query_length=390, key_length=390),
    Case("plan: uneven, causal", plan="uneven", causal=True, query_length=390, key_length=390),
    Case("plan: full, causal", plan="full", causal=True, query_length=390, key_length=390),
    Case("plan: last block, causal", plan="last block", causal=True, query_length=390, key_length=390),
    Case("plan: uneven, causal, key lengths", plan="uneven", causal=True, batch=2, key_lengths=(0, 200), query_length=390, key_length=390),
    Case("plan: last block, key lengths", plan="last block", batch=3, key_lengths=(300, 256, 257)),
    Case("plan: uneven, negative logits", plan="uneven", data="negative logits", query_length=390, key_length=390),
    Case("plan: uneven, rising norms", plan="uneven", data="rising norms", query_length=390, key_length=390),
    Case("block size 64", plan="uneven", block_size=64),
)

TAIL_CASES = tuple(replace(case, name=f"tail, {case.name}", tail=True) for case in SPARSE_CASES if not case.causal)

MEAN_CASES = tuple((length, block) for length in (1, 127, 128, 129, 300, 640) for block in (128, 64, 7))
