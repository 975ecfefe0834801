"""The benchmark of what lies around the kernels: what it times really ran, and its parts add up."""

from __future__ import annotations

import sys

import benchmarks.overhead as bench
import pytest
import torch

from ditattn.ops import cpu_library

needs_kernel = pytest.mark.skipif(cpu_library.problem() is not None, reason=f"no CPU kernels: {cpu_library.problem()}")


def test_a_dense_call_is_timed_beside_diffusers_own() -> None:
    row = bench.measure_dense((1, 2, 3), rounds=3)
    assert row.title == "dense, S 6"
    assert {what: len(values) for what, values in row.rounds_us.items()} == {"native": 3, "installed": 3, "difference": 3}
    spent = row.rounds_us
    assert spent["difference"] == [ours - native for ours, native in zip(spent["installed"], spent["native"], strict=True)]


@needs_kernel
def test_the_parts_of_a_sparse_call_add_up() -> None:
    spent = bench.measure_sparse((2, 16, 16), rounds=2).rounds_us
    assert set(spent) == {"native", "whole", "kernel", "selection", "rest"}
    assert all(min(values) > 0 for values in spent.values())
    for whole, *parts in zip(*(spent[what] for what in ("whole", "kernel", "selection", "rest")), strict=True):
        assert sum(parts) == pytest.approx(whole)


@needs_kernel
def test_a_call_that_does_not_run_sparse_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes no plan, so there is no selection to tell from the rest."""
    monkeypatch.setitem(bench.SPARSE, "min_tokens", 10**6)
    with pytest.raises(IndexError):
        bench.measure_sparse((2, 16, 16), rounds=1)


def test_what_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["overhead", "--rounds", "2"])
    monkeypatch.setattr(bench, "GRIDS", ((1, 2, 2), (2, 16, 16)))
    threads = torch.get_num_threads()
    try:
        bench.main()
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("H 2, D 64, float32, one thread; medians of 2 rounds")
    assert [line for line in lines[1:] if not line.startswith(" ")][:2] == ["dense, S 4", "dense, S 512"]
    native = [line.split() for line in lines if line.startswith("  native")]
    assert all(words[2:] == ["us", "1.00", "x"] for words in native)
    assert all(line.endswith(" x") for line in lines if line.startswith("  "))
