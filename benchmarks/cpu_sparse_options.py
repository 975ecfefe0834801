"""What rows of uneven length, a token order per head and a pooled tail cost the compiled CPU kernel: one call in turns with the plain one.

    python -m benchmarks.cpu_sparse_options

B1 H4 S8192 D128 bfloat16, 75 % of the blocks dropped. CPU time of the process, which other work on the machine lengthens less than wall
time, and which does not show threads that wait for each other. Ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ditattn.ops import cpu_library
from ditattn.ops.block_sparse_attention import block_sparse_attention
from ditattn.ops.pooled_tail import PooledTail
from ditattn.plan.block_plan import BlockPlan, num_blocks
from ditattn.plan.token_order import TokenOrder

LENGTH, HEADS, DIM = 8192, 4, 128
DENSITY = 0.25
# how many times as much as the first head the last one keeps, but for full rows
STEEPNESS = 8


def even_counts(blocks: int) -> Tensor:
    """int64 `[1, H, M]`: every row keeps the same."""
    return torch.full((1, HEADS, blocks), round(DENSITY * blocks))


def geometric_counts(blocks: int, steepness: float = 1.0) -> Tensor:
    """int64 `[1, H, M]`: geometrically distributed, with the sum of `even_counts`; the last head weighs `steepness` times the first."""
    weights = steepness ** torch.linspace(0, 1, HEADS).view(1, HEADS, 1)
    drawn = torch.empty(1, HEADS, blocks).exponential_() * weights
    total = int(even_counts(blocks).sum())
    for _ in range(100):
        drawn = (drawn * total / drawn.sum()).clamp(1, blocks)
    counts = drawn.round().long()
    while missing := total - int(counts.sum()):
        open_rows = counts < blocks if missing > 0 else counts > 1
        chosen = open_rows.flatten().nonzero().flatten()[: abs(missing)]
        counts.view(-1)[chosen] += 1 if missing > 0 else -1
    return counts


def plan_of(counts: Tensor, length: int) -> BlockPlan:
    """Each row keeps `counts` blocks, drawn."""
    blocks = counts.shape[2]
    place = torch.rand(1, HEADS, blocks, blocks).argsort(-1).argsort(-1)
    return BlockPlan.from_mask(place < counts.unsqueeze(-1), length, length)


def calls(length: int) -> dict[str, Callable[[], object]]:
    """The plain call first."""
    query, key, value = (torch.randn(1, length, HEADS, DIM).bfloat16() for _ in range(3))
    blocks = num_blocks(length)
    plain = plan_of(even_counts(blocks), length)
    geometric, steep = (plan_of(geometric_counts(blocks, steepness), length) for steepness in (1, STEEPNESS))
    forward = torch.stack([torch.randperm(length) for _ in range(HEADS)])
    order = TokenOrder(forward, forward.argsort(-1), (0, 1), (0, length), length)
    tail = PooledTail.of(key, value)

    def attend(plan: BlockPlan = plain, order: TokenOrder | None = None, tail: PooledTail | None = None) -> Tensor:
        return block_sparse_attention(query, key, value, plan, order=order, tail=tail, implementation="cpu")

    return {
        "plain": attend,
        "plain once more": attend,
        "geometric rows": lambda: attend(geometric),
        "geometric rows, uneven heads": lambda: attend(steep),
        "an order per head": lambda: attend(order=order),
        "a tail": lambda: attend(tail=tail),
        "an order per head and a tail": lambda: attend(order=order, tail=tail),
        "making the tail": lambda: PooledTail.of(key, value),
    }


def measure(found: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of CPU time of every call in every round."""
    spent: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 1):
        for name, call in found.items():
            begin = time.process_time()
            call()
            # the first round warms up
            if number:
                spent[name].append(1e3 * (time.process_time() - begin))
    return spent


def lines(spent: dict[str, list[float]]) -> list[str]:
    """A table for people."""
    base = next(iter(spent.values()))
    rows = ["| call | ms of CPU time (median) | ratio to plain | quartiles |", "|---|---|---|---|"]
    for name, values in spent.items():
        ratios = [value / plain for value, plain in zip(values, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows.append(f"| {name} | {statistics.median(values):.2f} | {middle:.3f} | {low:.3f} - {high:.3f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens")
    asked = parser.parse_args()
    torch.manual_seed(0)
    print(f"kernels: {cpu_library.selection().sentence()}, threads: {torch.get_num_threads()}, S {asked.length}, rounds: {asked.rounds}")
    print("\n".join(lines(measure(calls(asked.length), asked.rounds))))


if __name__ == "__main__":
    main()
