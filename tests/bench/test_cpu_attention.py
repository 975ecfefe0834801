"""The measurement of CPU attention: what it prints is computed from the rounds, and the peers run the same problem."""

from __future__ import annotations

import json
import subprocess
import time

import pytest
import torch

from ditattn.bench import cpu_attention, timing
from ditattn.bench.timing import Timing, interleaved, machine, ratio
from ditattn.ops import cpu_library
from ditattn.ops.block_sparse_attention import block_sparse_attention

needs_kernel = pytest.mark.skipif(cpu_library.problem() is not None, reason=f"no CPU kernels: {cpu_library.problem()}")


def test_ratios_are_taken_within_a_round() -> None:
    assert ratio(Timing("slow", (2.0, 40.0, 6.0)), Timing("fast", (1.0, 10.0, 2.0))) == (3.0, 2.0, 4.0)
    assert Timing("x", (3.0, 1.0, 2.0)).median_ms == 2.0


def test_rounds_are_interleaved_and_the_first_does_not_count() -> None:
    order: list[str] = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, shortest_s=0)
    assert order == ["a", "b"] * 3
    assert len(times["a"].rounds_ms) == 2


def test_fast_calls_are_repeated_and_their_best_run_kept() -> None:
    lengths = iter([0.0, 0.003, 0.001, 0.003] + [0.002] * 100)
    times = interleaved({"x": lambda: time.sleep(next(lengths))}, rounds=1, shortest_s=0.004)
    assert times["x"].rounds_ms[0] < 3


@pytest.mark.parametrize("density", [0.5, 0.25, 0.125])
def test_random_plans_have_the_asked_density(density: float) -> None:
    plan = cpu_attention.random_plan(2048, 2, density)
    plan.check(1, 2)
    assert plan.density() == density


@needs_kernel
def test_a_report_has_every_ratio_and_is_json() -> None:
    measured = cpu_attention.measure_shape(512, 2, 64, torch.bfloat16, rounds=2)
    found = json.loads(json.dumps({"machine": machine(), "report": [measured.as_dict()]}))
    assert found["machine"]["kernels"] in cpu_library.VARIANTS
    ratios = found["report"][0]["ratios"]
    assert {
        "dense / SDPA",
        "dense rate / matmul 2048 rate",
        "sparse, 75.0% dropped / gather + SDPA",
        "all threads / one thread",
    } <= ratios.keys()
    assert all(low <= median <= high for median, low, high in ratios.values())
    text = cpu_attention.render(measured)
    assert "| sparse 0.25 |" in text
    assert "### B1 H2 S512 D64 bfloat16" in text


@needs_kernel
def test_growth_reports_an_exponent() -> None:
    measured = cpu_attention.measure_growth((256, 512, 1024), 1, 64, torch.bfloat16, rounds=1)
    assert [t.name for t in measured.times] == ["S 256", "S 512", "S 1024"]
    assert measured.ratios[0].median > 0


@needs_kernel
def test_a_whole_rain_fusion_call_is_measured_with_its_parts() -> None:
    measured = cpu_attention.measure_video((3, 16, 16), 2, 64, torch.float32, rounds=1)
    assert {t.name for t in measured.times} >= {"dense SDPA", "Rain Fusion, whole call", "means and selection", "sparse attention"}
    assert "density that ran" in measured.title


@needs_kernel
@pytest.mark.slow
def test_flex_attention_runs_the_same_plan() -> None:
    tensors, plan = cpu_attention._draw(512, 2, 64, torch.bfloat16), cpu_attention.random_plan(512, 2, 0.5)
    flex = cpu_attention._flex(*tensors, plan)().transpose(1, 2).float()
    own = block_sparse_attention(*tensors, plan, implementation="cpu").float()
    assert (flex - own).norm() < 0.01 * own.norm()


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
