"""Peak memory at a real shape: S = 32760, H = 12, D = 128."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("backend", ["rain_fusion_attn", "block_sparse_attn"])
def test_peak_stays_under_three_times_the_tensors(backend: str) -> None:
    command = [sys.executable, "-m", "benchmarks.sparse_memory", "--backend", backend]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["qkv_out_bytes"] == 4 * 32760 * 12 * 128 * 2
    assert 0.1 < row["density"] < 0.5
    assert 1 < row["peak_over_qkv_out"] < 3
