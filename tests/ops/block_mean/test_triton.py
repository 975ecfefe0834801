"""The Triton kernel of the block mean, compiled without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditattn.packages import TRITON
from fresh_python import child

COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from ditattn.ops.block_mean.triton import STEP, mean_kernel

constants = {"BLOCK": 128, "STEP": STEP, "PADDED_DIM": 128, "stride_d": 1}
types = {"x": "*bf16", "out": "*fp32", "order": "*i64", **dict.fromkeys(constants, "constexpr")}
names = mean_kernel.arg_names
places = {(names.index(name),): value for name, value in constants.items()}
aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("x", "out", "stride_b", "stride_s", "stride_h", "head_dim")}
signature = {name: types.get(name, "i32") for name in names}
# tokens in another order, and where they are
plain = signature | {"order": "constexpr"}, places | {(names.index("order"),): None}
sources = [ASTSource(mean_kernel, signature, places, aligned), ASTSource(mean_kernel, *plain, aligned)]
for arch in map(int, sys.argv[1:]):
    for source in sources:
        ptx = compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4}).asm["ptx"]
        print(arch, "ld.global.v4" in ptx)
"""


@pytest.mark.slow
@pytest.mark.skipif(TRITON.missing(), reason=TRITON.sentence())
def test_it_compiles_for_every_architecture_and_reads_16_bytes_at_a_time(tmp_path: Path) -> None:
    archs = ("80", "86", "90", "100", "120")
    script = tmp_path / "compile_means.py"
    script.write_text(COMPILE, encoding="utf-8")
    done = child([str(script), *archs], interpreted=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == [f"{arch} True" for arch in archs for _ in ("ordered", "plain")]
