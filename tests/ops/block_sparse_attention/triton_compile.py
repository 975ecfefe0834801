"""Compile the kernel for one architecture without a GPU; prints JSON, one row per head size and set of options.

python tests/ops/block_sparse_attention/triton_compile.py 90
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from ditattn.ops.block_sparse_attention.tiles import tiles_for
from ditattn.ops.block_sparse_attention.triton import attend_kernel
from triton_resources import resources

MATRIX_INSTRUCTION = {9: "wgmma.mma_async", 10: "tcgen05.mma"}
INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "cp.async.bulk.tensor", "cp.async.cg")
POINTERS = {
    "lse": "*fp32",
    "indices": "*i32",
    "counts": "*i32",
    "starts": "*i32",
    "order": "*i64",
    "key_lengths": "*i64",
    "tail_dropped": "*u8",
    "tail_log_counts": "*fp32",
}
TAIL = ("tail_key", "tail_value", "tail_dropped", "tail_log_counts")
# a causal call takes no tail and no order
OPTIONS: dict[str, tuple[str, ...]] = {"plain": (), "causal": ("causal", "lengths"), "tail": ("lengths", "tail", "order")}


def source(arch: int, head_dim: int, options: tuple[str, ...], dtype: str = "bf16") -> ASTSource:
    """The kernel with the types and constants of a call."""
    tiles = tiles_for((arch // 10, arch % 10), head_dim)
    padded = triton.next_power_of_2(head_dim)
    constants = {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded,
        "BLOCK": 128,
        "STEP": tiles.keys,
        "CAUSAL": "causal" in options,
        "DESCRIPTORS": tiles.descriptors,
        "NEGATIVE": False,
    }
    if "lengths" not in options:
        constants |= {"lse": None, "key_lengths": None}
    if "order" not in options:
        constants |= {"order": None}
    if "tail" not in options:
        constants |= dict.fromkeys(TAIL)
    if not tiles.descriptors:
        constants |= {"key_descriptor": None, "value_descriptor": None}
    signature, aligned = {}, {}
    for number, name in enumerate(attend_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_descriptor"):
            signature[name] = f"tensordesc<{dtype}[1, {tiles.keys}, 1, {padded}]>"
        elif name == "scale_log2":
            signature[name] = "fp32"
        elif name in ("query", "key", "value", "out") or name in POINTERS or name in TAIL:
            signature[name] = POINTERS.get(name, f"*{dtype}")
            aligned[(number,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if "stride" in name:
                aligned[(number,)] = [["tt.divisibility", 16]]
    numbers = {name: number for number, name in enumerate(attend_kernel.arg_names)}
    return ASTSource(attend_kernel, signature, {(numbers[name],): value for name, value in constants.items()}, aligned)


def row(arch: int, head_dim: int, options: str) -> dict[str, object]:
    tiles = tiles_for((arch // 10, arch % 10), head_dim)
    launch = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    compiled = compile_kernel(source(arch, head_dim, OPTIONS[options]), target=GPUTarget("cuda", arch, 32), options=launch)
    return {
        "arch": arch,
        "head_dim": head_dim,
        "options": options,
        "shared_bytes": compiled.metadata.shared,
        "matrix_instruction": MATRIX_INSTRUCTION.get(arch // 10, "mma.sync"),
        "ptx_instructions": [name for name in INSTRUCTIONS if name in compiled.asm["ptx"]],
        **resources(compiled.asm["cubin"]),
    }


def main() -> None:
    arch = int(sys.argv[1])
    print(json.dumps([row(arch, head_dim, options) for head_dim in (32, 64, 96, 128) for options in OPTIONS]))


if __name__ == "__main__":
    main()
