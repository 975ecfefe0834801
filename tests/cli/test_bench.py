"""`ditattn bench`: every table is printed, the JSON is whole, and without kernels it says so. Sizes are tiny; no time is judged."""

from __future__ import annotations

import json
import time

import pytest

import forked
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
needs_kernel = pytest.mark.skipif(cpu_library.problem() is not None, reason=f"no CPU kernels: {cpu_library.problem()}")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    # a call is not repeated until it has run for a while
    monkeypatch.setattr(timing, "SHORTEST_S", 0)
    monkeypatch.setattr(suite, "FULL", suite.Sizes(256, (256, 512), (3, 16, 16), matmul=128))
    monkeypatch.setattr(suite, "QUICK", suite.Sizes(128, (128, 256), None, matmul=128))


@pytest.fixture
def fresh(tmp_path):
    """The command in a process that takes the kernels which the environment names: (exit status, stdout, stderr)."""

    def run(isa):
        said = [tmp_path / name for name in ("stdout", "stderr")]
        with said[0].open("wb") as out, said[1].open("wb") as err:
            arguments = ["bench", "--no-flex", "--rounds", "1", "--json"]
            process = forked.start("tiny_bench", arguments, {"DITATTN_CPU_ISA": isa}, out.fileno(), err.fileno())
            process.join()
        return process.exitcode, *(path.read_text(encoding="utf-8") for path in said)

    return run


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
    # stderr has the progress and nothing else
    assert all(line.startswith("table ") for line in done.err.splitlines())
    for number, title in enumerate(TITLES, 1):
        subject = f"table {number} of 6: {title.replace('S256', 'S128')}: "
        told = [line.removeprefix(subject) for line in done.err.splitlines() if line.startswith(subject)]
        assert told[-2:] == ["warm-up round", "round 1 of 1"]


@needs_kernel
def test_a_reference_that_is_too_slow_for_the_budget_is_marked_in_tables_and_json(ditattn, monkeypatch):
    """A product that sleeps: 20 ms at 256, 160 ms at 512. Two runs there do not end in an eighth of a second."""
    ran = []

    def matmul(n, dtype):
        return lambda: (ran.append(n), time.sleep(0.02 * (n / 256) ** 3))

    monkeypatch.setattr(cpu_attention, "_matmul", matmul)
    monkeypatch.setattr(suite, "QUICK", suite.Sizes(128, (128, 256), None, matmul=512))
    done = ditattn("bench", "--quick", "--no-flex", "--rounds", 1, "--json", "--budget", 1)
    assert done.status == 0, done.err
    # five tables, each with a run to warm up and one that is timed
    assert ran == [256] * 10
    found = json.loads(done.out)
    assert found["budget_s"] == 1
    for answer in found["report"][:5]:
        assert list(answer["smaller"]) == ["matmul 512"]
        assert answer["ms"]["matmul 512, at n 256"] > 19
        assert answer["rounds"]["matmul 512, at n 256"] == 1
        assert "dense rate / matmul 512 rate (by the rate of matmul 512, at n 256)" in answer["ratios"]
        assert not {"matmul 512", "dense rate / matmul 512 rate"} & {*answer["ms"], *answer["gflops"], *answer["ratios"]}
    assert done.err.count("\nmatmul 512: measured once: by its rate at n 256 it would take ") == 5
    assert done.err.count(": how long matmul 512 takes, at n 256\n") == 5


@needs_kernel
def test_the_json_says_how_many_rounds_ran(ditattn):
    found = json.loads(ditattn("bench", "--quick", "--no-flex", "--rounds", 2, "--json").out)
    assert [set(answer["rounds"].values()) for answer in found["report"]] == [{2}] * 6


@needs_kernel
def test_flex_attention_that_cannot_be_compiled_is_left_out_with_the_reason(ditattn, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = ditattn("bench", "--quick", "--rounds", 1, "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert "no-such-compiler" in found["left_out"]["FlexAttention"]
    assert not any("FlexAttention 0.25" in answer["ms"] for answer in found["report"])


def test_without_kernels_it_says_why_and_measures_nothing(fresh):
    status, out, err = fresh("none")
    assert (status, out) == (1, "")
    assert err.splitlines() == ["ditattn: error: nothing was measured, there is no compiled kernel: switched off by DITATTN_CPU_ISA=none"]


@pytest.mark.slow
def test_the_kernels_that_the_environment_names_are_measured(fresh):
    status, out, err = fresh("avx2")
    if "ditattn: error: nothing was measured" in err:
        pytest.skip(err)
    assert status == 0, err
    found = json.loads(out)
    assert found["machine"]["kernels"] == "avx2"
    assert [answer["title"] for answer in found["report"]] == list(TITLES)


def test_wrong_numbers_of_rounds_are_refused(ditattn):
    done = ditattn("bench", "--rounds", 0)
    assert done.status == 2
    assert len(done.error_lines) == 1
    assert "--rounds" in done.error_lines[0]


def test_a_budget_without_time_is_refused(ditattn):
    done = ditattn("bench", "--budget", 0)
    assert done.status == 2
    assert len(done.error_lines) == 1
    assert "--budget" in done.error_lines[0]
