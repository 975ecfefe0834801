"""The measurement of CPU attention: what it prints is computed from the rounds, and the peers run the same problem."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ditattn.bench import cpu_attention, timing
from ditattn.bench.agreement import agreeing
from ditattn.bench.cpu_peers import PEERS, Peer
from ditattn.bench.timing import Effort, Timing, interleaved, machine, ratio, seconds
from ditattn.ops import cpu_library
from ditattn.ops.block_sparse_attention import block_sparse_attention
from ditattn.plan.block_plan import BlockPlan

needs_kernel = pytest.mark.skipif(cpu_library.problem() is not None, reason=f"no CPU kernels: {cpu_library.problem()}")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call is not repeated until it has run for a while."""
    monkeypatch.setattr(timing, "SHORTEST_S", 0)


def test_ratios_are_taken_within_a_round() -> None:
    assert ratio(Timing("slow", (2.0, 40.0, 6.0)), Timing("fast", (1.0, 10.0, 2.0))) == (3.0, 2.0, 4.0)
    assert Timing("x", (3.0, 1.0, 2.0)).median_ms == 2.0


def test_rounds_are_interleaved_and_the_first_does_not_count(quick: None) -> None:
    order: list[str] = []
    effort = Effort(rounds=2)
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, effort, effort.until_s())
    assert order == ["a", "b"] * 3
    assert len(times["a"].rounds_ms) == 2


def test_fast_calls_are_repeated_and_their_best_run_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST_S", 4.0)
    now, lengths = [0.0], iter([3.0, 0.5, 1.0, 7.0])

    def call() -> None:
        now[0] += next(lengths)

    assert seconds(call, lambda: now[0]) == 0.5
    assert next(lengths) == 7.0


@pytest.mark.parametrize("density", [0.5, 0.25, 0.125])
def test_random_plans_have_the_asked_density(density: float) -> None:
    plan = cpu_attention.random_plan(2048, 2, density)
    plan.check(1, 2)
    assert plan.density() == density


@needs_kernel
def test_a_report_has_every_ratio_and_is_json(quick: None) -> None:
    measured = cpu_attention.measure_shape(512, 2, 64, torch.bfloat16, Effort(rounds=2), matmul=128)
    found = json.loads(json.dumps({"machine": machine(), "report": [measured.as_dict()]}))
    assert found["machine"]["kernels"] in cpu_library.VARIANTS
    ratios = found["report"][0]["ratios"]
    assert {
        "dense / SDPA",
        "dense rate / matmul 128 rate",
        "sparse, 75.0% dropped / gather + SDPA",
        "all threads / one thread",
    } <= ratios.keys()
    assert all(low <= median <= high for median, low, high in ratios.values())
    assert set(found["report"][0]["rounds"].values()) == {2}
    assert found["report"][0]["smaller"] == {}
    # packages that may be here or not
    assert found["report"][0]["left_out"].keys() <= {"zentorch", "vLLM", "sequential, overlapped"}
    text = cpu_attention.render(measured)
    assert "| sparse 0.25 |" in text
    assert "### B1 H2 S512 D64 bfloat16" in text


@pytest.fixture
def without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight calls in a table, whatever packages are installed."""
    monkeypatch.setattr(cpu_attention, "PEERS", ())


@needs_kernel
def test_peers_are_rows_and_one_that_refuses_or_differs_is_left_out_with_the_reason(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
        raise RuntimeError("not on a Tuesday\nwith a trace")

    def zeros(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
        return lambda: query * 0

    def not_numbers(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
        return lambda: query / 0

    others = (Peer("refuses", refusing), Peer("zeros", zeros), Peer("NaN", not_numbers))
    monkeypatch.setattr(cpu_attention, "PEERS", (*PEERS[:2], *others))
    told: list[str] = []
    measured = cpu_attention.measure_shape(256, 2, 64, torch.float32, Effort(rounds=1, progress=told.append), matmul=128)
    without_tiles = {"bf16x3, bf16x6"} if cpu_library.tile_problem() else set()
    assert measured.left_out.keys() == {"refuses", "zeros", "NaN"} | without_tiles
    assert measured.left_out["refuses"] == "RuntimeError: not on a Tuesday"
    assert measured.left_out["zeros"] == "its result differs from the reference by 1 of the norm at S 256, more than 1e-05"
    assert "more than 1e-05" in measured.left_out["NaN"]
    names = {t.name for t in measured.times}
    assert {"SDPA, flash kernel", "SDPA, math kernel"} <= names
    assert not names & measured.left_out.keys()
    ratios = {ratio.what for ratio in measured.ratios}
    assert {"dense / SDPA, flash kernel", "dense / SDPA, math kernel"} <= ratios
    assert not {f"dense / {name}" for name in measured.left_out} & ratios
    # everything is compared, and before the first round
    compared = [line for line in told if "comparing" in line]
    assert len(compared) == (12 if without_tiles else 16)
    assert all("with the reference, at S 256" in line for line in compared)
    assert told[: len(compared)] == compared
    assert "\nleft out: refuses: RuntimeError: not on a Tuesday" in cpu_attention.render(measured)


@needs_kernel
@pytest.mark.parametrize(
    ("dtype", "forms"),
    [(torch.float32, ("bf16x3", "bf16x6")), (torch.float16, ("bf16x3",)), (torch.bfloat16, ("sequential", "overlapped"))],
)
def test_what_needs_a_tile_unit_has_rows_where_there_is_one(
    quick: None, without_peers: None, dtype: torch.dtype, forms: tuple[str, ...]
) -> None:
    measured = cpu_attention.measure_shape(256, 2, 64, dtype, Effort(rounds=1), matmul=128)
    rows = {t.name for t in measured.times if t.name.endswith(forms)}
    ratios = {ratio.what for ratio in measured.ratios if any(form in ratio.what for form in forms)}
    if problem := cpu_library.tile_problem():
        assert measured.left_out == {", ".join(forms): problem}
        assert not rows
        assert not ratios
        return
    assert measured.left_out == {}
    assert rows == {name for form in forms for name in (f"dense, {form}", f"sparse 0.25, {form}")}
    of_form = ("dense, {} / own dense", "dense, {} / SDPA", "sparse, 75.0% dropped, {} / own sparse")
    assert ratios == {what.format(form) for form in forms for what in of_form}


@needs_kernel
def test_a_peer_that_holds_all_scores_runs_where_they_fit(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "PEERS", PEERS[:2])
    # two heads of 512 x 512 scores in fp32
    monkeypatch.setattr(cpu_attention, "MOST_SCORE_BYTES", 2 * 4 * 512**2)
    measured = cpu_attention.measure_shape(1024, 2, 64, torch.float32, Effort(rounds=1), matmul=128)
    names = [t.name for t in measured.times]
    assert "SDPA, flash kernel" in names
    assert "SDPA, math kernel, at S 512" in names
    assert measured.smaller["SDPA, math kernel"].startswith("measured once: it holds copies of whole heads of scores; at more than S 512")
    assert "dense / SDPA, math kernel (by the rate of SDPA, math kernel, at S 512)" in {ratio.what for ratio in measured.ratios}


@needs_kernel
def test_a_slow_reference_runs_once_at_a_smaller_size_and_is_marked(
    quick: None, without_peers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow()
    monkeypatch.setattr(cpu_attention, "_matmul", slow.matmul)
    measured = cpu_attention.measure_shape(256, 2, 64, torch.bfloat16, slow.effort(rounds=2, budget_s=240_000), matmul=2048)
    # a share of 30000 s, an eighth; at 2048 one product would take 64000 s, at 1024 8000 s
    assert slow.ran == [256, 256, 512, 1024]
    found = json.loads(json.dumps(measured.as_dict()))
    name = "matmul 2048, at n 1024"
    assert "matmul 2048" not in found["ms"]
    assert found["ms"][name] == pytest.approx(8e6, rel=0.01)
    assert measured.gflops[name] == pytest.approx(2 * 1024**3 / 8e12, rel=0.01)
    assert (found["rounds"][name], found["rounds"]["dense"]) == (1, 2)
    assert list(found["smaller"]) == ["matmul 2048"]
    assert found["smaller"]["matmul 2048"].startswith("measured once: by its rate at n 1024 it would take 640")
    median, low, high = found["ratios"][f"dense rate / matmul 2048 rate (by the rate of {name})"]
    assert median == low == high
    assert median == pytest.approx(measured.gflops["dense"] / measured.gflops[name], rel=0.01)
    assert "dense rate / matmul 2048 rate" not in found["ratios"]
    assert "dense / SDPA" in found["ratios"]
    text = cpu_attention.render(measured)
    assert f"| {name} | 80" in text
    assert "\nmatmul 2048: measured once: by its rate at n 1024" in text


@needs_kernel
def test_a_budget_reduces_the_rounds_and_the_table_says_how_many_ran(
    quick: None, without_peers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow()
    monkeypatch.setattr(cpu_attention, "_matmul", slow.matmul)
    measured = cpu_attention.measure_shape(256, 2, 64, torch.bfloat16, slow.effort(rounds=70, budget_s=144_000), matmul=1024)
    # a share of 18000 s holds two runs of 8000 s; 1250 s for two looks at 256 and one at 512 leave time for 17
    assert slow.ran == [256, 256, 512] + 17 * [1024]
    assert measured.as_dict()["rounds"] == {t.name: 16 for t in measured.times}
    assert "| 16 |" in cpu_attention.render(measured)


@needs_kernel
def test_a_table_without_a_warm_up_round_says_so(quick: None, without_peers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow()
    monkeypatch.setattr(cpu_attention, "_matmul", slow.matmul)
    # a single size is run without a look; a second run would end at 250 s
    measured = cpu_attention.measure_shape(256, 2, 64, torch.bfloat16, slow.effort(rounds=7, budget_s=200), matmul=256)
    assert slow.ran == [256]
    assert measured.left_out["warm-up round"] == "the budget had time for one round only, which counts"
    assert measured.as_dict()["left_out"] == measured.left_out
    assert "left out: warm-up round: the budget" in cpu_attention.render(measured)


class Slow:
    """A reference of 125 s at 256, by the cube of the size, on a clock that it moves instead of sleeping; other calls take milliseconds."""

    def __init__(self) -> None:
        self.slept_s = 0.0
        self.ran: list[int] = []

    def effort(self, rounds: int, budget_s: float) -> Effort:
        return Effort(rounds, budget_s, clock=lambda: time.perf_counter() + self.slept_s)

    def matmul(self, n: int, dtype: torch.dtype) -> Callable[[], object]:
        def run() -> None:
            self.ran.append(n)
            self.slept_s += 125 * (n / 256) ** 3

        return run


@needs_kernel
def test_growth_reports_an_exponent() -> None:
    measured = cpu_attention.measure_growth((256, 512, 1024), 1, 64, torch.bfloat16, Effort(rounds=1))
    assert [t.name for t in measured.times] == ["S 256", "S 512", "S 1024"]
    assert measured.ratios[0].median > 0


@needs_kernel
def test_lengths_without_time_are_left_out_of_the_growth(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleeping 1 s at 256, by the square of the length."""
    slow = Slow()
    ran = []

    def sparse(self: cpu_attention.Problems, length: int, density: float) -> Callable[[], object]:
        def run() -> None:
            ran.append(length)
            slow.slept_s += (length / 256) ** 2

        return run

    monkeypatch.setattr(cpu_attention.Problems, "sparse", sparse)
    measured = cpu_attention.measure_growth((256, 512, 1024), 1, 64, torch.bfloat16, slow.effort(1, 50.0), density=1.0)
    assert measured.left_out == {"S 1024": "the budget of 50 s is too short for it"}
    assert 1024 not in ran
    assert measured.ratios[0].median == pytest.approx(2, abs=0.1)
    assert "left out: S 1024: the budget of 50 s" in cpu_attention.render(measured)
    measured = cpu_attention.measure_growth((256, 512, 1024), 1, 64, torch.bfloat16, slow.effort(1, 5.0), density=1.0)
    assert [t.name for t in measured.times] == ["S 256"]
    assert list(measured.left_out) == ["S 512", "S 1024", "exponent of the time in S"]
    assert "| ratio |" not in cpu_attention.render(measured)


@needs_kernel
def test_a_video_that_is_too_slow_has_smaller_frames(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of it sleeps 1 s at 256 tokens, by the square."""
    slow = Slow()

    def parts(
        problems: cpu_attention.Problems, grid: tuple[int, int, int], sparsity: float
    ) -> tuple[dict[str, Callable[[], object]], float]:
        names = ("Rain Fusion, whole call", "means and selection", "sparse attention", "sparse attention, ordering")

        def run() -> None:
            slow.slept_s += (math.prod(grid) / 256) ** 2

        return dict.fromkeys(names, run), 0.5

    monkeypatch.setattr(cpu_attention, "_video_parts", parts)
    measured = cpu_attention.measure_video((2, 32, 32), 2, 64, torch.float32, slow.effort(1, 200.0))
    # two runs of 16 s end in a share of 33 s; two of 64 s do not
    assert "S1024 D64" in measured.title
    assert measured.smaller["all calls"].startswith(
        "token grid (2, 32, 16) instead of (2, 32, 32); the whole call: by its rate at S 1024 it would take 64 s"
    )
    assert {len(t.rounds_ms) for t in measured.times} == {1}


@needs_kernel
def test_a_whole_rain_fusion_call_is_measured_with_its_parts(quick: None) -> None:
    measured = cpu_attention.measure_video((3, 16, 16), 2, 64, torch.float32, Effort(rounds=1))
    assert {t.name for t in measured.times} >= {"dense SDPA", "Rain Fusion, whole call", "means and selection", "sparse attention"}
    assert "density that ran" in measured.title


def test_flex_attention_is_made_smaller_by_its_plan_and_compiled_before_the_time_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[float] = []
    problems = cpu_attention.Problems(2, 64, torch.bfloat16)

    def flex(*tensors: Tensor) -> Callable[[BlockPlan], Callable[[], Tensor]]:
        def call(plan: BlockPlan) -> Callable[[], Tensor]:
            def run() -> Tensor:
                ran.append(plan.density())
                return block_sparse_attention(*tensors, plan, implementation="torch")

            return run

        return call

    monkeypatch.setattr(cpu_attention, "_flex", flex)
    told: list[str] = []
    effort = Effort(progress=told.append)
    call = cpu_attention._flex_call(problems, 2048, 0.25, effort)
    assert agreeing([call], effort) == ([call], {})
    assert ran == [1 / 16]
    assert told == [
        "comparing FlexAttention 0.25 with the reference, at density 0.0625",
        "compiling FlexAttention, for up to a minute",
    ]
    assert (call.name, call.sizes, call.label(2)) == ("FlexAttention 0.25", (1, 2, 4), "density 0.125")
    assert call.work is not None
    assert [call.work(kept) for kept in call.sizes] == [4 * 2048**2 * 2 * 64 * kept / 16 for kept in call.sizes]
    call.make(4)()
    assert ran[1:] == [0.25]


@needs_kernel
@pytest.mark.slow
def test_flex_attention_runs_the_same_plan() -> None:
    tensors = cpu_attention.Problems(2, 64, torch.bfloat16).tensors(512)
    flex = cpu_attention._flex(*tensors)
    # one code for all plans of a shape
    for density, stance in ((0.25, "default"), (0.5, "fail_on_recompile")):
        plan = cpu_attention.random_plan(512, 2, density)
        with torch.compiler.set_stance(stance):
            found = flex(plan)().float()
        own = block_sparse_attention(*tensors, plan, implementation="cpu").float()
        assert (found - own).norm() < 0.01 * own.norm()


def test_the_commit_is_the_packages_own(tmp_path, monkeypatch) -> None:
    def git(*arguments: str) -> None:
        settings = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *settings, *arguments], check=True, capture_output=True)

    package = tmp_path / "venv" / "site-packages" / "timing.py"
    package.parent.mkdir(parents=True)
    package.write_text("")
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "a project with an environment inside")
    monkeypatch.setattr(timing, "__file__", str(package))
    assert machine()["commit"] is None
    git("add", ".")
    git("commit", "-q", "-m", "a source tree")
    assert len(str(machine()["commit"])) >= 7


def test_without_git_the_commit_is_unknown(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine()["commit"] is None
