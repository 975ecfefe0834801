"""The benchmark of the sparse call's options: what it compares, and that it runs."""

from __future__ import annotations

import sys

import benchmarks.cpu_sparse_options as bench
import pytest

from ditattn.ops import cpu_library


@pytest.mark.parametrize("steepness", [1, bench.STEEPNESS])
def test_uneven_rows_keep_as_much_as_even_ones(steepness: float) -> None:
    counts = bench.geometric_counts(64, steepness)
    assert counts.sum() == bench.even_counts(64).sum() == 64 * bench.HEADS * 16
    assert counts.min() >= 1
    assert counts.max() <= 64
    assert counts.float().std() > 8
    assert bench.plan_of(counts, 64 * 128).counts.tolist() == counts.tolist()


@pytest.mark.skipif(cpu_library.problem() is not None, reason=f"no CPU kernels: {cpu_library.problem()}")
def test_every_call_has_its_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["cpu_sparse_options", "--rounds", "2", "--length", "600"])
    bench.main()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 + len(bench.calls(300))
    assert printed[3].startswith("| plain | ")
    assert "| 1.000 | 1.000 - 1.000 |" in printed[3]
