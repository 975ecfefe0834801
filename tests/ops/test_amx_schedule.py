"""The two schedules of the bf16 kernel for AMX: which one serves, and what the overlapped one does where maxima grow.

Without a tile unit most of this is skipped; `make test-isa` runs it on emulated tiles.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import judge
from cases import DATA, Case, Problem, build
from ditattn.errors import BackendUnavailable
from ditattn.ops import amx_schedule, cpu_library, preference, self_measurement
from ditattn.ops.amx_schedule import Measurement, measurement
from ditattn.ops.block_sparse_attention import TABLE, block_sparse_attention_with_lse
from ditattn.ops.calls import DenseCall
from ditattn.ops.dense_attention import TABLE as DENSE_TABLE
from ditattn.ops.dense_attention import dense_attention
from ditattn.ops.table import CallFacts, Implementation, choose

needs_tiles = pytest.mark.skipif(cpu_library.tile_problem() is not None, reason=f"{cpu_library.tile_problem()}")
NAMES = ("cpu_sequential", "cpu_overlapped")


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx_schedule, "_MEASURED", {})


def _dense(problem: Problem, name: str) -> Tensor:
    return dense_attention(problem.query, problem.key, problem.value, **problem.options, implementation=name)


@pytest.mark.parametrize(
    ("sequential_ms", "overlapped_ms", "chosen"), [(2.0, 1.0, "overlapped"), (1.0, 2.0, "sequential"), (1.0, 0.95, "sequential")]
)
def test_the_fastest_runs_decide_and_a_near_tie_does_not(
    sequential_ms: float, overlapped_ms: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, bool, int]] = []
    now_s = [0.0]
    monkeypatch.setattr(self_measurement.time, "perf_counter", lambda: now_s[0])

    def run(call: DenseCall, overlapped: bool) -> None:
        assert call.query.dtype == torch.bfloat16
        calls.append((call.query.shape[3], overlapped, torch.get_num_threads()))
        # every round but the last is slowed down by the machine
        slower = 9.0 if len(calls) <= 2 * (amx_schedule.ROUNDS - 1) else 0.0
        now_s[0] += ((overlapped_ms if overlapped else sequential_ms) + slower) / 1e3

    threads = torch.get_num_threads()
    found = measurement(96, run)
    assert measurement(96, run) is found
    assert calls == [(96, False, 1), (96, True, 1)] * amx_schedule.ROUNDS
    assert torch.get_num_threads() == threads
    assert amx_schedule.found(96) is found
    assert amx_schedule.found(64) is None
    assert found.overlapped == (chosen == "overlapped")
    assert found.sentence().endswith(f"so {chosen}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("table", [TABLE, DENSE_TABLE], ids=["sparse", "dense"])
def test_they_run_by_name_on_a_tile_unit_only(name: str, table: tuple[Implementation, ...]) -> None:
    facts = CallFacts("cpu", torch.bfloat16, 64)
    if cpu_library.tile_problem():
        with pytest.raises(BackendUnavailable, match=r"needs the tile unit \(amx\): "):
            choose(table, facts, (name,))
    else:
        assert choose(table, facts, (name,)).name == name


@pytest.mark.skipif(cpu_library.tile_problem() is None, reason="there is a tile unit")
def test_nothing_is_measured_without_a_tile_unit() -> None:
    if cpu_library.problem():
        pytest.skip(str(cpu_library.problem()))
    _dense(build(Case("plain"), torch.bfloat16), "cpu")
    assert amx_schedule._MEASURED == {}


@needs_tiles
@pytest.mark.parametrize("overlapped", [False, True])
def test_cpu_is_the_faster_one(overlapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = build(Case("served"), torch.bfloat16)
    sequential, other = (_dense(problem, name) for name in NAMES)
    assert not torch.equal(sequential, other)
    monkeypatch.setattr(amx_schedule, "_MEASURED", {64: Measurement(64, 2.0 if overlapped else 1.0, 1.0 if overlapped else 2.0)})
    assert torch.equal(_dense(problem, "cpu"), other if overlapped else sequential)


@needs_tiles
def test_the_report_of_a_machine_names_the_schedule() -> None:
    sentence = preference.dense_on_cpu(CallFacts("cpu", torch.bfloat16, 40)).sentence()
    assert "; AMX, head size 64: sequential " in sentence
    assert sentence.endswith(("so sequential", "so overlapped"))


@needs_tiles
def test_a_log_sum_exp_is_that_of_unrounded_weights() -> None:
    problem = build(Case("lse", query_length=700, key_length=700, plan="random"), torch.bfloat16)
    exact = judge.exact_result(problem)[1]
    with_lse = partial(block_sparse_attention_with_lse, problem.query, problem.key, problem.value, problem.plan)
    sequential, overlapped = (with_lse(implementation=name)[1] for name in NAMES)
    # sums of the rounded weights would be a hundred times farther off
    assert (overlapped - exact).abs().max() < 2 * (sequential - exact).abs().max() < 2e-4


def _growing(problem: Problem, steps: Tensor) -> Problem:
    """Keys whose scores rise from block to block by `steps`, as powers of two: every query has the same large first element."""
    problem.query[..., 0] = 8
    blocks = torch.arange(problem.key.shape[1]) // 128
    scale = problem.query.shape[3] ** -0.5
    problem.key[..., 0] = (steps.cumsum(0)[blocks] / (8 * scale * 1.4427)).to(problem.key.dtype)[None, :, None]
    return problem


@needs_tiles
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([0.0, 5, 5, 5, 5, 5, 5], id="below the first bound"),
        pytest.param([0.0, 12, 12, 12, 12, 12, 12], id="raised"),
        pytest.param([0.0, 60, 0, 60, 60, 0, 60], id="formed again"),
        pytest.param([0.0, 200, 200, -300, 12, 0, 200], id="beyond fp32"),
        pytest.param([0.0, -60, -60, -60, -60, -60, -60], id="falling"),
    ],
)
def test_maxima_that_grow_from_block_to_block(dim: int, steps: list[float]) -> None:
    problem = _growing(build(Case("growing", query_length=200, key_length=880, dim=dim), torch.bfloat16), torch.tensor(steps))
    out = _dense(problem, "cpu_overlapped")
    judge.check_output(out, problem)
    assert torch.equal(out, _dense(problem, "cpu_overlapped"))


@needs_tiles
def test_one_row_that_outgrows_its_reference_changes_no_other() -> None:
    problem = build(Case("one row", query_length=256, key_length=640), torch.bfloat16)
    before = _dense(problem, "cpu_overlapped")
    problem.query[:, 77] *= 200
    out = _dense(problem, "cpu_overlapped")
    judge.check_output(out, problem)
    # of the other panel every bit; in its own the job's weights were formed again, relative to other references
    assert torch.equal(out[:, 128:], before[:, 128:])
    assert torch.equal(out[:, :64], before[:, :64])
    others = [row for row in range(256) if row != 77]
    judge_error = judge.relative_error(out[:, others], before[:, others].double())
    assert judge_error < 5e-3


@needs_tiles
def test_threads_change_nothing() -> None:
    problem = build(Case("threads", batch=2, query_length=520, key_length=520, dim=128), torch.bfloat16)
    torch.set_num_threads(1)
    one = _dense(problem, "cpu_overlapped")
    torch.set_num_threads(4)
    assert torch.equal(one, _dense(problem, "cpu_overlapped"))


@needs_tiles
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("data", DATA)
def test_its_error_is_near_that_of_the_sequential_one(data: str, dim: int) -> None:
    problem = build(Case("error", query_length=384, key_length=1024, dim=dim, data=data), torch.bfloat16)
    exact = judge.exact_result(problem)[0]
    sequential, overlapped = (judge.relative_error(_dense(problem, name), exact) for name in NAMES)
    assert overlapped < 1.1 * sequential
