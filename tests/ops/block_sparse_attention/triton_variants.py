"""Run in a child process with TRITON_INTERPRET=1: variants of the kernel against the oracle. Prints the names of the cases as JSON."""

from __future__ import annotations

import json

import torch

import judge
from cases import Case, build
from ditattn.ops.block_sparse_attention.tiles import Tiles
from ditattn.ops.block_sparse_attention.triton import launch
from ditattn.ops.calls import SparseCall

VARIANTS = (Tiles(keys=128, num_warps=4, num_stages=2, descriptors=True), Tiles(keys=64, num_warps=4, num_stages=2))
CASES = (
    Case("uneven, grouped heads", plan="uneven", heads=4, query_length=200, key_length=517),
    Case("head size 96, key lengths", plan="uneven", batch=2, dim=96, heads=1, key_heads=1, key_lengths=(200, 300)),
    Case("causal", plan="full", causal=True, heads=1, key_heads=1),
    Case("transposed, negative scale", plan="random", layout="transposed", scale=-0.1),
    Case("tail of more means than a step", plan="uneven", tail=True, heads=1, key_heads=1, dim=32, query_length=130, key_length=70 * 128),
)


def main() -> None:
    names = []
    for tiles in VARIANTS:
        for case in CASES:
            problem = build(case, torch.float16)
            tensors = [x.clone() if tiles.descriptors else x for x in (problem.query, problem.key, problem.value)]
            scale = case.dim**-0.5 if case.scale is None else case.scale
            out, lse = launch(SparseCall(*tensors, problem.plan, scale, case.causal, problem.key_lengths, True, tail=problem.tail), tiles)
            judge.check_output(out, problem)
            judge.check_lse(lse, problem)
            names.append(f"{case}, {tiles}")
    print(json.dumps(names))


if __name__ == "__main__":
    main()
