"""The CPU benchmark asks the questions of `ditattn bench` and keeps their answers where it is told to."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import benchmarks.cpu_attention as bench
import pytest

from ditattn.bench import suite, timing
from ditattn.ops import cpu_library


@pytest.mark.skipif(cpu_library.problem() is not None, reason=f"no CPU kernels: {cpu_library.problem()}")
def test_record_appends_the_line_that_json_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "new" / "cpu_attention.jsonl"
    monkeypatch.setattr(bench, "RESULTS", results)
    monkeypatch.setattr(timing, "SHORTEST_S", 0)
    monkeypatch.setattr(suite, "QUICK", suite.Sizes(128, (128, 256), None, matmul=128))
    monkeypatch.setattr(sys, "argv", ["cpu_attention", "--quick", "--no-flex", "--rounds", "1", "--budget", "60", "--json", "--record"])
    for _ in range(2):
        bench.main()
    printed = capsys.readouterr()
    assert printed.out == results.read_text()
    assert printed.err.count("round 1 of 1\n") == 12
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert [len(line["report"]) for line in found] == [6, 6]
    assert found[0]["budget_s"] == 60
    assert found[0]["machine"]["kernels"] == cpu_library.selection().sentence()
