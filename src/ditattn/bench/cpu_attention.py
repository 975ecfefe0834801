"""How fast attention is on this CPU: the compiled kernel against what others have for it, and against a plain matrix product.

The others: torch's SDPA, its flash and its math kernel alone, gather + SDPA, FlexAttention, oneDNN's graph, zentorch and vLLM. On CPUs
with a tile unit fp32 and fp16 also have rows for products from bf16 parts, bf16 for each of the kernel's two schedules. Every call of
attention is compared with the reference before it is timed; one that refuses or differs is left out, with the reason.

Times are medians of interleaved rounds; what is compared is the ratio of calls in the same round. Rates count the work that the plan
keeps: 4 * D operations per kept query-key pair. A call that is too slow for its share of the time runs once at a smaller size, and is
compared by its rate there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch
from torch import Tensor

from ditattn.backends.rain_fusion_attn import RainFusionAttentionBackend
from ditattn.backends.selection import mean_pool
from ditattn.bench.agreement import agreeing
from ditattn.bench.budget import Call, Row, compared, halvings, measure, settle
from ditattn.bench.cpu_peers import PEERS, Peer
from ditattn.bench.timing import Effort, Timing, machine
from ditattn.ops import cpu_library
from ditattn.ops.block_sparse_attention import block_sparse_attention
from ditattn.ops.block_sparse_attention.flex import block_mask
from ditattn.ops.dense_attention import TABLE as DENSE_TABLE
from ditattn.ops.dense_attention import dense_attention
from ditattn.plan.block_plan import BLOCK_SIZE, BlockPlan, num_blocks
from ditattn.plan.token_order import token_order

__all__ = ["Measured", "Ratio", "measure_growth", "measure_shape", "measure_video", "render", "render_machine"]

DENSITIES = (0.5, 0.25, 0.125)
# implementations `cpu_NAME` on a tile unit: products from bf16 parts, and the two schedules of those of bf16 tensors
FORMS = ("bf16x3", "bf16x6", "sequential", "overlapped")
# tokens, and rows of a matrix, at which it is found out how slow a call is
LEAST_SIZE = 256
# of one copy, in fp32, of the scores that a call may hold
MOST_SCORE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Ratio:
    """Median, smallest and largest per-round ratio."""

    what: str
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """One shape: its times, rates in GFLOP/s and ratios; by name, why a call ran at a smaller size or not at all."""

    title: str
    times: tuple[Timing, ...]
    gflops: dict[str, float] = field(default_factory=dict)
    ratios: tuple[Ratio, ...] = ()
    smaller: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        return {
            "title": self.title,
            "rounds": {t.name: len(t.rounds_ms) for t in self.times},
            "ms": {t.name: round(t.median_ms, 3) for t in self.times},
            "gflops": {name: round(value, 1) for name, value in self.gflops.items()},
            "ratios": {r.what: [round(r.median, 3), round(r.low, 3), round(r.high, 3)] for r in self.ratios},
            "smaller": self.smaller,
            "left_out": self.left_out,
        }


class Problems:
    """Self-attention on random tensors, B 1, at any number of tokens; what was drawn once is kept."""

    def __init__(self, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.heads = heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.tensors = cache(self._draw)
        self.plan = cache(lambda length, density: random_plan(length, heads, density))

    def dense(self, length: int, implementation: str) -> Callable[[], Tensor]:
        return partial(dense_attention, *self.tensors(length), implementation=implementation)

    def sparse(self, length: int, density: float, implementation: str = "cpu") -> Callable[[], Tensor]:
        return partial(block_sparse_attention, *self.tensors(length), self.plan(length, density), implementation=implementation)

    def peer(self, length: int, peer: Peer) -> Callable[[], Tensor]:
        return peer.prepare(*self.tensors(length))

    def most_scores(self) -> tuple[int, str]:
        """The largest number of tokens at which all scores of the problem may be held, and why."""
        most = math.isqrt(MOST_SCORE_BYTES // (4 * self.heads))
        return (
            most,
            f"it holds copies of whole heads of scores; at more than S {most} each would take over {MOST_SCORE_BYTES >> 20} MiB in fp32",
        )

    def dense_work(self, length: int) -> float:
        """Floating-point operations."""
        return 4.0 * length * length * self.heads * self.head_dim

    def sparse_work(self, length: int, density: float) -> float:
        return self.dense_work(length) * self.plan(length, density).density()

    def title(self, length: int | None = None) -> str:
        tokens = "" if length is None else f" S{length}"
        return f"B1 H{self.heads}{tokens} D{self.head_dim} {str(self.dtype)[6:]}"

    def _draw(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(1, length, self.heads, self.head_dim, generator=generator).to(self.dtype) for _ in range(3))
        return query, key, value


def measure_shape(
    length: int, heads: int, head_dim: int, dtype: torch.dtype, effort: Effort, flex: bool = False, matmul: int = 2048
) -> Measured:
    """B 1, S `length`: dense and three densities, one thread, and the peers, among them a product of two `matmul` x `matmul` matrices.

    The time begins after all calls have been compared with the reference, and FlexAttention compiled.

    Raises:
        BackendUnavailable: there are no compiled kernels on this machine; says why.
    """
    problems = Problems(heads, head_dim, dtype)
    title = problems.title(length)
    effort = effort.about(title)
    forms = _forms(dtype)
    without_tiles = cpu_library.tile_problem()
    calls, left_out = agreeing(_shape_calls(problems, length, matmul, () if without_tiles else forms, flex, effort), effort)
    if forms and without_tiles:
        left_out[", ".join(forms)] = without_tiles
    rows = measure(calls, effort, effort.until_s())
    work = problems.dense_work(length) / _matmul_work(matmul)
    return _table(title, rows, tuple(_shape_ratios(rows, f"matmul {matmul}", work)), left_out)


def _forms(dtype: torch.dtype) -> tuple[str, ...]:
    """Those that take tensors of a dtype."""
    rows = {row.name: row.dtypes for row in DENSE_TABLE}
    return tuple(form for form in FORMS if str(dtype).removeprefix("torch.") in rows[f"cpu_{form}"])


def _shape_calls(problems: Problems, length: int, matmul: int, forms: tuple[str, ...], flex: bool, effort: Effort) -> Iterator[Call]:
    sizes = halvings(length, LEAST_SIZE)
    right = cache(lambda n: problems.dense(n, "reference")())

    def one_thread(n: int) -> Callable[[], Tensor]:
        return partial(_on_one_thread, problems.dense(n, "cpu"))

    def dense(name: str, make: Callable[[int], Callable[[], Tensor]], holds_scores: bool = False) -> Call:
        largest = problems.most_scores() if holds_scores else None
        return Call(name, sizes, make, problems.dense_work, expected=right, largest=largest)

    def sparse(name: str, density: float, implementation: str) -> Call:
        make = partial(problems.sparse, density=density, implementation=implementation)
        work = partial(problems.sparse_work, density=density)
        return Call(name, sizes, make, work, expected=lambda n: problems.sparse(n, density, "reference")())

    matrix = partial(_matmul, dtype=problems.dtype)
    yield Call(f"matmul {matmul}", halvings(matmul, LEAST_SIZE), matrix, _matmul_work, "n {}".format)
    yield dense("dense SDPA", partial(problems.dense, implementation="torch"))
    yield dense("dense", partial(problems.dense, implementation="cpu"))
    yield dense("dense, 1 thread", one_thread)
    for form in forms:
        yield dense(f"dense, {form}", partial(problems.dense, implementation=f"cpu_{form}"))
    for peer in PEERS:
        yield dense(peer.name, partial(problems.peer, peer=peer), peer.holds_scores)
    for density in DENSITIES:
        yield sparse(f"sparse {density:g}", density, "cpu")
    for form in forms:
        yield sparse(f"sparse 0.25, {form}", 0.25, f"cpu_{form}")
    yield sparse("gather + SDPA 0.25", 0.25, "torch")
    if flex:
        yield _flex_call(problems, length, 0.25, effort)


def _shape_ratios(rows: dict[str, Row], matmul: str, work: float) -> Iterator[Ratio]:
    """Of the calls that were timed. `work`: that of the dense call in matrix products."""
    pairs = [("dense / SDPA", "dense SDPA", "dense", 1.0), (f"dense rate / {matmul} rate", matmul, "dense", work)]
    pairs += [(f"dense / {peer.name}", peer.name, "dense", 1.0) for peer in PEERS]
    pairs += [(f"sparse, {1 - density:.1%} dropped / own dense", "dense", f"sparse {density:g}", 1.0) for density in DENSITIES]
    pairs.append(("sparse, 75.0% dropped / dense SDPA", "dense SDPA", "sparse 0.25", 1.0))
    pairs.append(("sparse, 75.0% dropped / gather + SDPA", "gather + SDPA 0.25", "sparse 0.25", 1.0))
    pairs.append(("sparse, 75.0% dropped / compiled FlexAttention", "FlexAttention 0.25", "sparse 0.25", 1.0))
    pairs.append(("all threads / one thread", "dense, 1 thread", "dense", 1.0))
    for form in FORMS:
        pairs.append((f"dense, {form} / own dense", "dense", f"dense, {form}", 1.0))
        pairs.append((f"dense, {form} / SDPA", "dense SDPA", f"dense, {form}", 1.0))
        pairs.append((f"sparse, 75.0% dropped, {form} / own sparse", "sparse 0.25", f"sparse 0.25, {form}", 1.0))
    for what, slow, fast, factor in pairs:
        if slow in rows and fast in rows:
            yield _ratio(what, rows[slow], rows[fast], factor)


def measure_video(
    grid: tuple[int, int, int], heads: int, head_dim: int, dtype: torch.dtype, effort: Effort, sparsity: float = 0.75
) -> Measured:
    """A whole Rain Fusion call (order, means, selection, attention, inverse order) against dense SDPA, and its parts.

    Where the whole call is too slow for its share of the time, frames are smaller.
    """
    problems = Problems(heads, head_dim, dtype)
    title = f"Rain Fusion at {sparsity:.0%} dropped"
    effort = effort.about(title)
    until_s = effort.until_s()
    grids = {math.prod(smaller): smaller for smaller in _smaller_frames(grid)}
    sizes = tuple(grids)
    parts = cache(lambda length: _video_parts(problems, grids[length], sparsity))

    def part(name: str) -> Callable[[int], Callable[[], object]]:
        return lambda length: parts(length)[0][name]

    name = "Rain Fusion, whole call"
    whole = Call(name, sizes, part(name), problems.dense_work)
    # two of its parts take about as long, and dense attention longer
    smaller = settle(whole, effort.budget_s / 6, effort)
    length = sizes[-1] if smaller is None else smaller.size
    calls, density = parts(length)
    dense_sizes = halvings(length, LEAST_SIZE)
    dense = [
        Call("dense SDPA", dense_sizes, partial(problems.dense, implementation="torch"), problems.dense_work),
        Call("dense", dense_sizes, partial(problems.dense, implementation="cpu"), problems.dense_work),
    ]
    rows = measure([*dense, *(Call(what, (length,), part(what)) for what in calls)], effort, until_s)
    ratios = (
        _ratio("Rain Fusion call / dense SDPA", rows["dense SDPA"], rows[name]),
        _ratio("Rain Fusion call / own dense", rows["dense"], rows[name]),
        _ratio("means and selection, share of attention", rows["means and selection"], rows["sparse attention"]),
        _ratio("whole call / attention alone on ordered tensors", rows[name], rows["sparse attention"]),
    )
    table = _table(f"{title}, density that ran {density:.3f}: {problems.title(length)}", rows, ratios)
    if smaller is None:
        return table
    shrunk = f"token grid {grids[length]} instead of {grid}; the whole call: {smaller.reason}"
    return replace(table, smaller={"all calls": shrunk, **table.smaller})


def _smaller_frames(grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """The grid and those with smaller frames, ascending: the longer side is halved. The number of frames decides the density, and stays."""
    frames, height, width = grid
    smaller = (frames, height, width // 2) if width >= height else (frames, height // 2, width)
    return [*(_smaller_frames(smaller) if math.prod(smaller) >= LEAST_SIZE else []), grid]


def _video_parts(problems: Problems, grid: tuple[int, int, int], sparsity: float) -> tuple[dict[str, Callable[[], object]], float]:
    """The whole call and its parts at one grid, and the density that runs."""
    query, key, value = problems.tensors(math.prod(grid))
    scale = problems.head_dim**-0.5
    impl = RainFusionAttentionBackend.get_impl_cls()(problems.heads, problems.head_dim)
    metadata = RainFusionAttentionBackend.get_builder_cls()().build(
        current_timestep=0, skip_first_steps=0, raw_latent_shape=(1, 16, *grid), patch_size=1, sparsity=sparsity
    )
    order = token_order("tile", grid)
    protected = order.protected_blocks(BLOCK_SIZE, grid[0] > 1, "cpu")
    ordered = [order.apply(x) for x in (query, key, value)]

    def select() -> BlockPlan:
        return mean_pool.select(query, key, scale=scale, sparsity=sparsity, protected=protected, order=order)

    plan = select()
    return {
        "Rain Fusion, whole call": lambda: impl.forward(query, key, value, metadata),
        "means and selection": select,
        "sparse attention": lambda: block_sparse_attention(ordered[0], ordered[1], ordered[2], plan, implementation="cpu"),
        "sparse attention, ordering": lambda: block_sparse_attention(query, key, value, plan, order=order, implementation="cpu"),
    }, plan.density()


def measure_growth(
    lengths: tuple[int, ...], heads: int, head_dim: int, dtype: torch.dtype, effort: Effort, density: float = 0.25
) -> Measured:
    """Time of the sparse call against S at a fixed density, and the exponent of a power law through the medians.

    Lengths that are too slow for the time are left out.
    """
    problems = Problems(heads, head_dim, dtype)
    title = f"Growth with S at density {density:g}: {problems.title()}"
    effort = effort.about(title)
    ladder = Call("the sparse call", lengths, partial(problems.sparse, density=density), partial(problems.sparse_work, density=density))
    # the longest takes most of the time, all the others together a third of its
    until_s = effort.until_s()
    reached = settle(ladder, effort.budget_s / 2, effort)
    ran = [length for length in lengths if reached is None or length <= reached.size]
    rows = measure([Call(f"S {length}", (length,), partial(problems.sparse, density=density)) for length in ran], effort, until_s)
    left_out = {f"S {length}": f"the budget of {effort.budget_s:g} s is too short for it" for length in lengths if length not in ran}
    if len(ran) < 2:
        return _table(title, rows, left_out={**left_out, "exponent of the time in S": "it needs two lengths"})
    x = torch.tensor([math.log(length) for length in ran], dtype=torch.float64)
    y = torch.tensor([math.log(row.full_ms) for row in rows.values()], dtype=torch.float64)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return _table(title, rows, (Ratio("exponent of the time in S", slope, slope, slope),), left_out)


def random_plan(length: int, heads: int, density: float, device: str = "cpu") -> BlockPlan:
    """A uniform random plan that keeps the same number of blocks in every row. Always the same one for the same arguments."""
    blocks = num_blocks(length)
    scores = torch.rand(1, heads, blocks, blocks, generator=torch.Generator(device).manual_seed(0), device=device)
    kept = max(1, round(blocks * density))
    ranks = scores.argsort(-1).argsort(-1)
    return BlockPlan.from_mask(ranks < kept, length, length).trimmed()


def _table(title: str, rows: dict[str, Row], ratios: tuple[Ratio, ...] = (), left_out: dict[str, str] | None = None) -> Measured:
    left_out = dict(left_out or {})
    if not all(row.timing.warmed_up for row in rows.values()):
        left_out["warm-up round"] = "the budget had time for one round only, which counts"
    return Measured(
        title,
        tuple(row.timing for row in rows.values()),
        {row.timing.name: row.gflops for row in rows.values() if row.gflops is not None},
        ratios,
        {name: f"measured once: {row.reason}" for name, row in rows.items() if not row.is_full},
        left_out,
    )


def _ratio(what: str, slow: Row, fast: Row, factor: float = 1.0) -> Ratio:
    """Of the times, times the factor. The name says which calls are compared by their rates at smaller sizes."""
    smaller = " and ".join(row.timing.name for row in (slow, fast) if not row.is_full)
    return Ratio(f"{what} (by the rate of {smaller})" if smaller else what, *(factor * value for value in compared(slow, fast)))


def render_machine() -> str:
    """The machine in one line, and why better kernels than the chosen ones are not used."""
    facts = "; ".join(f"{name} {value}" for name, value in machine().items())
    return f"{facts}\nkernels passed over: {cpu_library.selection().rejected or 'none'}"


def render(measured: Measured) -> str:
    """Markdown: one table of times, one of ratios, and what is to be said about single rows."""
    parts = [f"\n### {measured.title}\n", "| call | ms (median) | spread of rounds | rounds | GFLOP/s |\n|---|---|---|---|---|"]
    for t in measured.times:
        rate = _digits(measured.gflops[t.name]) if t.name in measured.gflops else ""
        parts.append(f"| {t.name} | {t.median_ms:.2f} | {min(t.rounds_ms):.2f} - {max(t.rounds_ms):.2f} | {len(t.rounds_ms)} | {rate} |")
    if measured.ratios:
        parts.append("\n| ratio | median | spread |\n|---|---|---|")
        parts += [f"| {r.what} | {_digits(r.median)} | {_digits(r.low)} - {_digits(r.high)} |" for r in measured.ratios]
    parts += [f"\n{name}: {reason}" for name, reason in measured.smaller.items()]
    parts += [f"\nleft out: {name}: {reason}" for name, reason in measured.left_out.items()]
    return "\n".join(parts)


def _digits(number: float) -> str:
    """Three digits, or the whole number where it has more."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _matmul(n: int, dtype: torch.dtype) -> Callable[[], object]:
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    return lambda: a @ b


def _matmul_work(n: int) -> float:
    return 2.0 * n**3


def _on_one_thread(call: Callable[[], Tensor]) -> Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return call()
    finally:
        torch.set_num_threads(threads)


def _flex_call(problems: Problems, length: int, density: float, effort: Effort) -> Call:
    """FlexAttention on the same plan, compiled when it first runs.

    Its sizes are kept blocks per row, since code for another S would have to be compiled again. The reference would need the memory of all
    scores: gather + SDPA, itself compared with the reference, stands for it.
    """
    blocks = num_blocks(length)

    @cache
    def flex() -> Callable[[BlockPlan], Callable[[], Tensor]]:
        effort.progress("compiling FlexAttention, for up to a minute")
        return _flex(*problems.tensors(length))

    return Call(
        f"FlexAttention {density:g}",
        halvings(max(1, round(blocks * density)), 1),
        lambda kept: flex()(problems.plan(length, kept / blocks)),
        lambda kept: problems.sparse_work(length, kept / blocks),
        lambda kept: f"density {kept / blocks:g}",
        expected=lambda kept: problems.sparse(length, kept / blocks, "torch")(),
    )


def _flex(query: Tensor, key: Tensor, value: Tensor) -> Callable[[BlockPlan], Callable[[], Tensor]]:
    """Compiled FlexAttention for any plan, one code for all; S has to be a multiple of the block."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(plan: BlockPlan) -> Callable[[], Tensor]:
        # indices of one width, or every plan would be compiled for
        indices = torch.nn.functional.pad(plan.indices, (0, plan.num_key_blocks - plan.indices.shape[-1]), value=-1)
        mask = block_mask(replace(plan, indices=indices))
        return lambda: compiled(q, k, v, block_mask=mask).transpose(1, 2)

    return call
