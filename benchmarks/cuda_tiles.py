"""Tile shapes of the Triton kernel on this GPU: every candidate that compiles and is right, timed on one problem.

    python -m benchmarks.cuda_tiles --head-dims 64,128

Prints a table for each head size, the fastest candidate first, with the entry of `ops/block_sparse_attention/tiles.py` marked. Candidates
take turns; a row is the median of its rounds. They are compiled in parallel beforehand.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor

from ditattn.bench.cpu_attention import random_plan
from ditattn.devices.clock import Stopwatch
from ditattn.ops.block_sparse_attention import block_sparse_attention
from ditattn.ops.block_sparse_attention.tiles import Tiles, tiles_for
from ditattn.ops.calls import SparseCall
from ditattn.plan.block_plan import BlockPlan

TOKENS, HEADS, DENSITY = 32760, 12, 0.25
KEYS, WARPS, STAGES = (32, 64, 128), (4, 8), (2, 3, 4)
MAX_RELATIVE_ERROR = 2e-2


def candidates() -> list[Tiles]:
    """Every combination, with and without tensor descriptors where the GPU has them."""
    descriptors = (True, False) if torch.cuda.get_device_capability()[0] >= 9 else (False,)
    return [Tiles(*sizes) for sizes in itertools.product(KEYS, WARPS, STAGES, descriptors)]


def problem(head_dim: int, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor, BlockPlan]:
    """q, k, v `[1, S, 12, D]` in bf16 and a random plan."""
    generator = torch.Generator("cuda").manual_seed(0)
    size = (1, tokens, HEADS, head_dim)
    q, k, v = (torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return q, k, v, random_plan(tokens, HEADS, DENSITY, "cuda")


def attend(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, tiles: Tiles) -> Tensor:
    from ditattn.ops.block_sparse_attention.triton import launch

    return launch(SparseCall(q, k, v, plan, q.shape[3] ** -0.5), tiles)[0]


def refusal(head_dim: int, tiles: Tiles) -> str | None:
    """Compiles a candidate; the first line of what stops it, or how wrong it is."""
    q, k, v, plan = problem(head_dim, 1000)
    try:
        error = attend(q, k, v, plan, tiles).float() - block_sparse_attention(q.float(), k.float(), v.float(), plan, implementation="torch")
        relative = (error.norm() / v.float().norm()).item()
    except Exception as problem_found:  # noqa: BLE001 - whatever a compiler raises takes its candidate off the list
        return (str(problem_found).splitlines() or [type(problem_found).__name__])[0]
    return None if relative < MAX_RELATIVE_ERROR else f"relative error {relative:.1e}"


def measure(head_dim: int, chosen: Sequence[Tiles], rounds: int) -> dict[Tiles, float]:
    """Median milliseconds."""
    q, k, v, plan = problem(head_dim)
    samples: dict[Tiles, list[float]] = {tiles: [] for tiles in chosen}
    for number in range(rounds + 1):
        for tiles in chosen:
            watch = Stopwatch()
            with watch.measure(q.device):
                attend(q, k, v, plan, tiles)
            # the first round loads code
            samples[tiles] += [watch.total_ms()] if number else []
    return {tiles: statistics.median(found) for tiles, found in samples.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here (torch sees no CUDA device): nothing was measured", file=sys.stderr)
        return 1
    head_dims, every = [int(one) for one in arguments.head_dims.split(",")], candidates()
    work = list(itertools.product(head_dims, every))
    with ProcessPoolExecutor(min(len(work), os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        refused = dict(zip(work, pool.map(refusal, *zip(*work, strict=True)), strict=True))
    for head_dim in head_dims:
        found = measure(head_dim, [tiles for tiles in every if refused[head_dim, tiles] is None], arguments.rounds)
        entry = tiles_for(torch.cuda.get_device_capability(), head_dim)
        print(f"{torch.cuda.get_device_name()}, head size {head_dim}, {TOKENS} tokens, {HEADS} heads, {DENSITY:.0%} kept")
        for tiles, ms in sorted(found.items(), key=lambda item: item[1]):
            rate = 4 * head_dim * HEADS * TOKENS**2 * DENSITY / ms / 1e9
            print(f"{ms:8.3f} ms {rate:5.0f} TFLOP/s {tiles}{'  <- the entry' if tiles == entry else ''}")
        for tiles in every:
            if (why := refused[head_dim, tiles]) is not None:
                print(f"       - {tiles}: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
