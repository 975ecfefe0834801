"""The CUDA benchmark on a machine without a GPU: what it says there, and its plumbing with arms that run on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

PLUMBING = """
import json, sys, time
from pathlib import Path
import benchmarks.cuda_attention as bench

bench.DENSE_ARMS, bench.SPARSE_ARMS, bench.SPARSITIES = ("flash",), ("torch", "cuda_only"), (0.5,)
refused = bench.check_arms("cpu", ("flash", "torch", "cuda_only"))
shape = bench.Shape("tiny", (2, 9, 20), heads=2, text=30, dim=32)
rows = bench.measure(shape, "cpu", 2, time.monotonic() + 60, refused)
bench.print_table(rows)
bench.write(rows, {"device": "cpu"}, Path(sys.argv[1]))
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_fails() -> None:
    done = python("-m", "benchmarks.cuda_attention")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["no NVIDIA GPU here (torch sees no CUDA device): nothing was measured"]


def test_plumbing(tmp_path: Path) -> None:
    results = tmp_path / "new" / "results.jsonl"
    done = python("-c", PLUMBING, str(results))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["flash", "torch", "cuda_only", "rain_fusion_attn", "- attention alone"]
    timed = [row for row in rows if row["arm"] != "cuda_only"]
    assert all(len(row["samples_ms"]) == 2 and row["median_ms"] > 0 and row["problem"] is None for row in timed)
    # 390 tokens, 2 heads of 32: the dense row counts every pair
    assert rows[0]["tflops"] == pytest.approx(4 * 32 * 2 * 390**2 / rows[0]["median_ms"] / 1e9)
    assert 0.4 < rows[1]["density"] < 0.6
    assert "no implementation named 'cuda_only'" in rows[2]["problem"]
    assert "no implementation named 'cuda_only'" in done.stdout
