"""How fast attention is on this CPU: the compiled kernel against torch's SDPA, gather + SDPA, FlexAttention and a plain matrix product.

Times are medians of interleaved rounds; what is compared is the ratio of calls in the same round. Rates count the work that the plan
keeps: 4 * D operations per kept query-key pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditattn.backends.rain_fusion_attn import RainFusionAttentionBackend
from ditattn.backends.selection import mean_pool
from ditattn.bench.timing import Timing, interleaved, machine, ratio
from ditattn.ops import cpu_library
from ditattn.ops.block_sparse_attention import block_sparse_attention
from ditattn.ops.block_sparse_attention.flex import block_mask
from ditattn.ops.dense_attention import dense_attention
from ditattn.plan.block_plan import BLOCK_SIZE, BlockPlan, num_blocks
from ditattn.plan.token_order import token_order

__all__ = ["Measured", "Ratio", "measure_growth", "measure_shape", "measure_video", "render", "render_machine"]

Calls = dict[str, Callable[[], object]]
DENSITIES = (0.5, 0.25, 0.125)


@dataclass(frozen=True)
class Ratio:
    """Median, smallest and largest per-round ratio."""

    what: str
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """One shape: its times, rates in GFLOP/s and ratios."""

    title: str
    times: tuple[Timing, ...]
    gflops: dict[str, float] = field(default_factory=dict)
    ratios: tuple[Ratio, ...] = ()

    def as_dict(self) -> dict[str, object]:
        return {
            "title": self.title,
            "ms": {t.name: round(t.median_ms, 3) for t in self.times},
            "gflops": {name: round(value, 1) for name, value in self.gflops.items()},
            "ratios": {r.what: [round(r.median, 3), round(r.low, 3), round(r.high, 3)] for r in self.ratios},
        }


def measure_shape(length: int, heads: int, head_dim: int, dtype: torch.dtype, rounds: int, flex: bool = False) -> Measured:
    """B 1, S `length`: dense and three densities, one thread, and the peers.

    Raises:
        BackendUnavailable: there are no compiled kernels on this machine; says why.
    """
    query, key, value = _draw(length, heads, head_dim, dtype)
    plans = {density: random_plan(length, heads, density) for density in DENSITIES}
    calls: Calls = {
        "matmul 2048": _matmul(dtype),
        "dense SDPA": lambda: dense_attention(query, key, value, implementation="torch"),
        "dense": lambda: dense_attention(query, key, value, implementation="cpu"),
        "dense, 1 thread": lambda: _on_one_thread(lambda: dense_attention(query, key, value, implementation="cpu")),
    }
    for density, plan in plans.items():
        calls[f"sparse {density:g}"] = _sparse((query, key, value), plan)
    calls["gather + SDPA 0.25"] = lambda: block_sparse_attention(query, key, value, plans[0.25], implementation="torch")
    if flex:
        calls["FlexAttention 0.25"] = _flex(query, key, value, plans[0.25])
    times = interleaved(calls, rounds)
    work = {name: _work(name, length, heads, head_dim) for name in times}
    gflops = {name: work[name] / t.median_ms / 1e6 for name, t in times.items()}
    return Measured(f"B1 H{heads} S{length} D{head_dim} {str(dtype)[6:]}", tuple(times.values()), gflops, tuple(_shape_ratios(times, work)))


def _shape_ratios(times: dict[str, Timing], work: dict[str, float]) -> Iterator[Ratio]:
    def pair(what: str, slow: str, fast: str, factor: float = 1.0) -> Ratio:
        return Ratio(what, *(factor * value for value in ratio(times[slow], times[fast])))

    yield pair("dense / SDPA", "dense SDPA", "dense")
    yield pair("dense rate / matmul 2048 rate", "matmul 2048", "dense", work["dense"] / work["matmul 2048"])
    for density in DENSITIES:
        yield pair(f"sparse, {1 - density:.1%} dropped / own dense", "dense", f"sparse {density:g}")
    yield pair("sparse, 75.0% dropped / dense SDPA", "dense SDPA", "sparse 0.25")
    yield pair("sparse, 75.0% dropped / gather + SDPA", "gather + SDPA 0.25", "sparse 0.25")
    if "FlexAttention 0.25" in times:
        yield pair("sparse, 75.0% dropped / compiled FlexAttention", "FlexAttention 0.25", "sparse 0.25")
    yield pair("all threads / one thread", "dense, 1 thread", "dense")


def measure_video(
    grid: tuple[int, int, int], heads: int, head_dim: int, dtype: torch.dtype, rounds: int, sparsity: float = 0.75
) -> Measured:
    """A whole Rain Fusion call (order, means, selection, attention, inverse order) against dense SDPA, and its parts."""
    length = math.prod(grid)
    query, key, value = _draw(length, heads, head_dim, dtype)
    impl = RainFusionAttentionBackend.get_impl_cls()(heads, head_dim)
    metadata = RainFusionAttentionBackend.get_builder_cls()().build(
        current_timestep=20, raw_latent_shape=(1, 16, *grid), patch_size=1, sparsity=sparsity
    )
    order = token_order("tile", grid)
    protected = order.protected_blocks(BLOCK_SIZE, grid[0] > 1, "cpu")
    ordered = [order.apply(x) for x in (query, key, value)]

    def select() -> BlockPlan:
        return mean_pool.select(query, key, scale=head_dim**-0.5, sparsity=sparsity, protected=protected, order=order)

    plan = select()
    times = interleaved(
        {
            "dense SDPA": lambda: dense_attention(query, key, value, implementation="torch"),
            "dense": lambda: dense_attention(query, key, value, implementation="cpu"),
            "Rain Fusion, whole call": lambda: impl.forward(query, key, value, metadata),
            "means and selection": select,
            "sparse attention": lambda: block_sparse_attention(ordered[0], ordered[1], ordered[2], plan, implementation="cpu"),
            "sparse attention, ordering": lambda: block_sparse_attention(query, key, value, plan, order=order, implementation="cpu"),
        },
        rounds,
    )
    ratios = (
        Ratio("Rain Fusion call / dense SDPA", *ratio(times["dense SDPA"], times["Rain Fusion, whole call"])),
        Ratio("Rain Fusion call / own dense", *ratio(times["dense"], times["Rain Fusion, whole call"])),
        Ratio("means and selection, share of attention", *ratio(times["means and selection"], times["sparse attention"])),
        Ratio("whole call / attention alone on ordered tensors", *ratio(times["Rain Fusion, whole call"], times["sparse attention"])),
    )
    title = (
        f"Rain Fusion at {sparsity:.0%} dropped, density that ran {plan.density():.3f}: B1 H{heads} S{length} D{head_dim} {str(dtype)[6:]}"
    )
    return Measured(title, tuple(times.values()), ratios=ratios)


def measure_growth(lengths: tuple[int, ...], heads: int, head_dim: int, dtype: torch.dtype, rounds: int, density: float = 0.25) -> Measured:
    """Time of the sparse call against S at a fixed density, and the exponent of a power law through the medians."""
    calls: Calls = {}
    for length in lengths:
        calls[f"S {length}"] = _sparse(_draw(length, heads, head_dim, dtype), random_plan(length, heads, density))
    times = interleaved(calls, rounds)
    x = torch.tensor([math.log(length) for length in lengths], dtype=torch.float64)
    y = torch.tensor([math.log(t.median_ms) for t in times.values()], dtype=torch.float64)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    title = f"Growth with S at density {density:g}: B1 H{heads} D{head_dim} {str(dtype)[6:]}"
    return Measured(title, tuple(times.values()), ratios=(Ratio("exponent of the time in S", slope, slope, slope),))


def random_plan(length: int, heads: int, density: float, device: str = "cpu") -> BlockPlan:
    """A uniform random plan that keeps the same number of blocks in every row. Always the same one for the same arguments."""
    blocks = num_blocks(length)
    scores = torch.rand(1, heads, blocks, blocks, generator=torch.Generator(device).manual_seed(0), device=device)
    kept = max(1, round(blocks * density))
    ranks = scores.argsort(-1).argsort(-1)
    return BlockPlan.from_mask(ranks < kept, length, length).trimmed()


def render_machine() -> str:
    """The machine in one line, and why better kernels than the chosen ones are not used."""
    facts = "; ".join(f"{name} {value}" for name, value in machine().items())
    return f"{facts}\nkernels passed over: {cpu_library.selection().rejected or 'none'}"


def render(measured: Measured) -> str:
    """Markdown: one table of times and one of ratios."""
    parts = [f"\n### {measured.title}\n", "| call | ms (median) | spread of rounds | GFLOP/s |\n|---|---|---|---|"]
    for t in measured.times:
        rate = f"{measured.gflops[t.name]:.0f}" if t.name in measured.gflops else ""
        parts.append(f"| {t.name} | {t.median_ms:.2f} | {min(t.rounds_ms):.2f} - {max(t.rounds_ms):.2f} | {rate} |")
    parts.append("\n| ratio | median | spread |\n|---|---|---|")
    parts += [f"| {r.what} | {r.median:.3g} | {r.low:.3g} - {r.high:.3g} |" for r in measured.ratios]
    return "\n".join(parts)


def _draw(length: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, length, heads, head_dim, generator=generator).to(dtype) for _ in range(3))
    return query, key, value


def _sparse(tensors: tuple[Tensor, Tensor, Tensor], plan: BlockPlan) -> Callable[[], object]:
    query, key, value = tensors
    return lambda: block_sparse_attention(query, key, value, plan, implementation="cpu")


def _matmul(dtype: torch.dtype) -> Callable[[], object]:
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    return lambda: a @ b


def _work(name: str, length: int, heads: int, head_dim: int) -> float:
    """Floating-point operations of the named call."""
    if name.startswith("matmul"):
        return 2.0 * 2048**3
    density = float(name.rsplit(" ", 1)[-1]) if name[-1].isdigit() else 1.0
    return 4.0 * length * length * heads * head_dim * density


def _on_one_thread(call: Callable[[], object]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call()
    finally:
        torch.set_num_threads(threads)


def _flex(query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan) -> Callable[[], object]:
    """Compiled FlexAttention on the same plan."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    mask = block_mask(plan)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask)
