"""What permuted_sparse_attn costs beside the sparse kernel: means, selection, an order per head, the tail; and the choice of the orders.

    python -m benchmarks.selection_cost                    B1 H12 S32760 D128 bfloat16, 75 % dropped: Wan 1.3B at 480p
    python -m benchmarks.selection_cost --dtype float32 --grid 17x16x16

CPU time of the process, which other work on the machine lengthens less than wall time. Ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.cpu_sparse_options import lines
from ditattn.backends.permuted_sparse_attn import PermutedSparseAttentionBackend, PermutedSparseAttentionImpl
from ditattn.backends.sparse import SparseAttentionMetadata
from ditattn.ops import cpu_library
from ditattn.ops.block_sparse_attention import block_sparse_attention
from ditattn.ops.dense_attention import dense_attention
from ditattn.plan.bricks import brick_order, brick_shapes

GRID, HEADS, DIM, SPARSITY = "21x30x52", 12, 128, 0.75
STEPS = 24
ALONE, WHOLE, CHOICE, DENSE = "sparse attention alone, one order", "the whole call", "choosing the orders, once per run", "dense attention"


def calls(grid: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Attention alone on the plan of the whole call first."""
    length = grid[0] * grid[1] * grid[2]
    query, key, value = (torch.randn(1, length, HEADS, DIM).to(dtype) for _ in range(3))
    impl, metadata, records = layer_of(grid)
    exact = dense_attention(query, key, value)
    impl._choose(query, key, value, metadata, exact)
    impl.forward(query, key, value, metadata)
    plan = records[-1].plan
    order = brick_order(brick_shapes(grid)[1], grid)
    return {
        ALONE: partial(block_sparse_attention, query, key, value, plan, order=order),
        WHOLE: partial(impl.forward, query, key, value, metadata),
        CHOICE: partial(impl._choose, query, key, value, metadata, exact),
        DENSE: partial(dense_attention, query, key, value),
    }


def layer_of(grid: tuple[int, int, int]) -> tuple[PermutedSparseAttentionImpl, SparseAttentionMetadata, list]:
    """One layer in a sparse step of a run, and what its calls record."""
    records: list = []
    impl = PermutedSparseAttentionBackend.get_impl_cls()(HEADS, DIM, observer=records.append)
    metadata = PermutedSparseAttentionBackend.get_builder_cls()().build(
        current_timestep=STEPS - 1, num_steps=STEPS, raw_latent_shape=(1, 16, *grid), patch_size=1, sparsity=SPARSITY
    )
    return impl, metadata, records


def measure(found: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of CPU time of every call in every round; the dense call, the longest, in the first round alone."""
    spent: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds):
        for name, call in found.items():
            if name == DENSE and number:
                spent[name].append(spent[name][0])
                continue
            begin = time.process_time()
            call()
            spent[name].append(1e3 * (time.process_time() - begin))
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--grid", default=GRID, help="tokens: frames x rows x columns")
    parser.add_argument("--dtype", default="bfloat16")
    asked = parser.parse_args()
    torch.manual_seed(0)
    frames, rows, columns = map(int, asked.grid.split("x"))
    with torch.inference_mode():
        spent = measure(calls((frames, rows, columns), getattr(torch, asked.dtype)), asked.rounds)
    kernels, threads = cpu_library.selection().sentence(), torch.get_num_threads()
    print(f"kernels: {kernels}, threads: {threads}, grid {asked.grid}, {asked.dtype}, {asked.rounds} rounds")
    print("\n".join(lines(spent)))
    whole, choice, dense = (min(spent[name]) for name in (WHOLE, CHOICE, DENSE))
    first = round(0.2 * STEPS)
    print(f"the choice is {choice / (first * dense + (STEPS - first) * whole):.1%} of the attention of a run of {STEPS} steps")


if __name__ == "__main__":
    main()
