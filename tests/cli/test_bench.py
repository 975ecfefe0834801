"""`ditattn bench`: every table is printed, the JSON is whole, and without kernels it says so. Sizes are tiny; no time is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import pytest

from ditattn.bench import cpu_attention, suite, timing
from ditattn.bench.timing import machine
from ditattn.ops import cpu_library

TITLES = (
    "B1 H4 S256 D128 bfloat16",
    "B1 H4 S256 D64 bfloat16",
    "B1 H4 S256 D128 float32",
    "B1 H4 S256 D64 float32",
    "B1 H4 S256 D128 float16",
    "Growth with S at density 0.25: B1 H1 D128 bfloat16",
)
FRESH = """
import sys
from functools import partial
from ditattn.cli import main
from ditattn.bench import cpu_attention, suite, timing
cpu_attention.interleaved = partial(timing.interleaved, shortest_s=0)
suite.FULL = suite.Sizes(256, (256, 512), None)
main(sys.argv[1:])
"""
needs_kernel = pytest.mark.skipif(cpu_library.problem() is not None, reason=f"no CPU kernels: {cpu_library.problem()}")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    # a call is not repeated until it has run for a while
    monkeypatch.setattr(cpu_attention, "interleaved", partial(timing.interleaved, shortest_s=0))
    monkeypatch.setattr(suite, "FULL", suite.Sizes(256, (256, 512), (3, 16, 16)))
    monkeypatch.setattr(suite, "QUICK", suite.Sizes(128, (128, 256), None))


def fresh(isa):
    command = [sys.executable, "-c", FRESH, "bench", "--no-flex", "--rounds", "1", "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "DITATTN_CPU_ISA": isa})


@needs_kernel
def test_json_is_all_of_stdout_and_holds_machine_and_report(ditattn):
    done = ditattn("bench", "--no-flex", "--rounds", 1, "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert found["machine"] == json.loads(json.dumps(machine()))
    assert (found["rounds"], found["left_out"]) == (1, {"FlexAttention": "not asked for"})
    titles = [answer["title"] for answer in found["report"]]
    assert titles[:-1] == list(TITLES)
    assert titles[-1].startswith("Rain Fusion at 75% dropped")
    assert titles[-1].endswith("B1 H12 S768 D128 bfloat16")
    assert all(ms > 0 for answer in found["report"] for ms in answer["ms"].values())
    # the tables are not lost
    assert all(f"### {title}" in done.err for title in titles)


@needs_kernel
def test_tables_for_people_begin_with_the_machine(ditattn):
    done = ditattn("bench", "--quick", "--no-flex", "--rounds", 1)
    assert done.status == 0, done.err
    first, second, third, *_ = done.out.splitlines()
    assert first == "; ".join(f"{name} {value}" for name, value in machine().items())
    assert second.startswith("kernels passed over: ")
    assert third == "left out: FlexAttention: not asked for"
    assert [line[4:] for line in done.out.splitlines() if line.startswith("### ")] == [t.replace("S256", "S128") for t in TITLES]
    assert done.out.count("| sparse, 75.0% dropped / own dense |") == 5
    assert done.err == ""


@needs_kernel
def test_flex_attention_that_cannot_be_compiled_is_left_out_with_the_reason(ditattn, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = ditattn("bench", "--quick", "--rounds", 1, "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert "no-such-compiler" in found["left_out"]["FlexAttention"]
    assert not any("FlexAttention 0.25" in answer["ms"] for answer in found["report"])


def test_without_kernels_it_says_why_and_measures_nothing():
    done = fresh("none")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "ditattn: error: nothing was measured, there is no compiled kernel: switched off by DITATTN_CPU_ISA=none"
    ]


@pytest.mark.slow
def test_the_kernels_that_the_environment_names_are_measured():
    done = fresh("avx2")
    if "ditattn: error: nothing was measured" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["machine"]["kernels"] == "avx2"
    assert [answer["title"] for answer in found["report"]] == list(TITLES)


def test_wrong_numbers_of_rounds_are_refused(ditattn):
    done = ditattn("bench", "--rounds", 0)
    assert done.status == 2
    assert len(done.error_lines) == 1
    assert "--rounds" in done.error_lines[0]
