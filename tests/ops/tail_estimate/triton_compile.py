"""Compile the kernels for one architecture without a GPU; prints JSON, one row per kernel and head size.

python tests/ops/tail_estimate/triton_compile.py 90
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from ditattn.ops.tail_estimate import triton as kernels
from ditattn.ops.tail_estimate.summary import PER_BLOCK, SUB_TOKENS
from triton_resources import resources

NUMBERS = ("stride", "num_", "length", "head_dim", "heads_per")
FACTORS = ("scale", "least_square")


def source(kernel: Any, constants: dict[str, Any], pointers: dict[str, str], multiples: tuple[str, ...]) -> ASTSource:
    """The kernel with the types and constants of a call; `multiples` are numbers that 16 divides."""
    signature, aligned = {}, {}
    for number, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in FACTORS:
            signature[name] = "fp32"
        elif any(part in name for part in NUMBERS) and name not in pointers:
            signature[name] = "i32"
        else:
            signature[name] = pointers.get(name, "*fp32")
        if signature[name].startswith("*") or name in multiples:
            aligned[(number,)] = [["tt.divisibility", 16]]
    numbers = {name: number for number, name in enumerate(kernel.arg_names)}
    return ASTSource(kernel, signature, {(numbers[name],): value for name, value in constants.items()}, aligned)


def sources(arch: int, head_dim: int) -> Iterator[tuple[str, ASTSource, dict[str, int]]]:
    padded = triton.next_power_of_2(head_dim)
    strides = tuple(f"{of}_stride_{axis}" for of in ("key", "value") for axis in "bsh")
    half = {"key": "*bf16", "value": "*bf16", "order": "*i64", "key_lengths": "*i64"}
    sizes = {"BLOCK": PER_BLOCK * SUB_TOKENS, "SUB": SUB_TOKENS, "PADDED_DIM": padded}
    yield "summary", source(kernels.summary_kernel, sizes, half, (*strides, "head_dim")), {"num_warps": kernels.SUMMARY_WARPS}
    tiles = kernels.LARGE if arch // 10 in (9, 10) else kernels.SMALL
    launch = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    sizes = {"GROUPS": tiles.groups, "SUBS": tiles.subs, "PER_BLOCK": PER_BLOCK, "PADDED_DIM": padded}
    yield "output", source(kernels.output_kernel, sizes | {"BLOCKS": kernels.BLOCKS}, {}, ("head_dim",)), launch
    yield "cost", source(kernels.cost_kernel, sizes, {}, ("head_dim",)), launch


def main() -> None:
    arch, rows = int(sys.argv[1]), []
    for head_dim in (32, 64, 96, 128):
        for name, code, launch in sources(arch, head_dim):
            compiled = compile_kernel(code, target=GPUTarget("cuda", arch, 32), options=launch)
            row = {"kernel": name, "head_dim": head_dim, "shared_bytes": compiled.metadata.shared}
            rows.append(row | {"tf32": "tf32" in compiled.asm["ptx"]} | resources(compiled.asm["cubin"]))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
