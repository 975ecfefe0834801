"""The Triton kernels without a GPU: the contract in the interpreter, and code for every architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ditattn.ops.block_sparse_attention.tiles import SHARED_MEMORY_BYTES
from ditattn.packages import TRITON
from fresh_python import child

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(TRITON.missing(), reason=TRITON.sentence())


# lengths that end inside a block; whole blocks come before the last one there, and 517 tokens hold one more of them than 300
FURTHER_LENGTHS = "256 or 517"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "fewest"),
    [
        (f"triton and not ({FURTHER_LENGTHS})", 36),
        pytest.param(f"triton and ({FURTHER_LENGTHS})", 3, marks=pytest.mark.long),
    ],
    ids=["quick", "further lengths"],
)
def test_contract_in_the_interpreter(chosen: str, fewest: int) -> None:
    suite = str(HERE / "test_contract.py")
    done = child(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", suite, "-k", chosen], interpreted=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(done.stdout.rsplit(" passed", 1)[0].split()[-1]) > fewest
    assert "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=[] if arch == 90 else pytest.mark.long) for arch in sorted(SHARED_MEMORY_BYTES) if arch != 89]
)
def test_every_kernel_compiles_and_fits(arch: int) -> None:
    done = child([str(HERE / "triton_compile.py"), str(arch)], interpreted=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    rows = json.loads(done.stdout)
    assert len(rows) == 3 * 4
    for row in rows:
        # four registers at most, depending on the compiler's version
        assert row["stack_bytes"] <= 16, row
        assert row["local_bytes"] == 0, row
        assert row["shared_bytes"] <= SHARED_MEMORY_BYTES[arch], row
        # sums over elements alone in the first kernel, products in the others
        assert row["tf32"] == (row["kernel"] != "summary"), row
