"""The compiled CPU kernels beyond the ops' contract: instruction sets, threads, processes, interrupts, builds."""

from __future__ import annotations

import _ctypes
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cpu_checks
import judge
from cases import Case, build
from ditattn.errors import BackendUnavailable, UnsupportedCall
from ditattn.ops import cpu_call, cpu_library, preference
from ditattn.ops.block_sparse_attention import TABLE, block_sparse_attention
from ditattn.ops.dense_attention import TABLE as DENSE_TABLE
from ditattn.ops.dense_attention import dense_attention
from ditattn.ops.table import CallFacts, Implementation, choose, explain
from ditattn.plan.block_plan import BlockPlan, num_blocks
from ditattn.plan.token_order import TokenOrder

ROOT = Path(__file__).parents[2]

needs_kernel = pytest.mark.skipif(cpu_library.problem() is not None, reason=f"no CPU kernels: {cpu_library.problem()}")


RUNS_HERE = [name for name in cpu_library.VARIANTS if isinstance(cpu_library._load(name), cpu_library.Library)]

# --- instruction sets -------------------------------------------------------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("part", [cpu_checks.check_cases, cpu_checks.check_tails])
def test_every_instruction_set_that_runs_here(part: Callable[[Sequence[str]], object]) -> None:
    assert {"baseline", cpu_library.selection().sentence()} <= set(RUNS_HERE)
    part(RUNS_HERE)


@needs_kernel
@pytest.mark.parametrize("variant", ["baseline", "avx2", "avx512"])
def test_every_fp16_number_is_read_and_rounded_as_torch_does(variant: str) -> None:
    """Each variant converts in its own way: instructions of the CPU, or integer arithmetic."""
    if variant not in RUNS_HERE:
        pytest.skip(f"this CPU cannot run {variant}")
    with cpu_checks.forced(variant):
        assert cpu_checks.check_fp16() > 2**16


@needs_kernel
@pytest.mark.parametrize("variant", cpu_library.VARIANTS)
def test_an_instruction_set_is_forced_by_the_environment(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = _select(monkeypatch, variant)
    if variant in RUNS_HERE:
        assert chosen.sentence() == variant
    else:
        assert "does not have the instructions" in chosen.sentence() or "does not permit" in chosen.sentence()


@needs_kernel
def test_the_environment_of_a_new_process_forces_it() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tests/cpu_checks.py", "fp16"],
        capture_output=True,
        text=True,
        timeout=300,
        # one OpenMP thread: torch's spinning threads would make the checks slow on a busy machine
        env={**os.environ, cpu_library.ENVIRONMENT: "baseline", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("baseline: ")


def _select(monkeypatch: pytest.MonkeyPatch, value: str) -> cpu_library.Selection:
    monkeypatch.setenv(cpu_library.ENVIRONMENT, value)
    return cpu_library.selection.__wrapped__()


def test_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _select(monkeypatch, "none").problem == "switched off by DITATTN_CPU_ISA=none"


def test_an_unknown_variant_lists_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "names no variant; there is baseline, avx2, avx512, avx512bf16, amx, none" in (_select(monkeypatch, "mmx").problem or "")


def test_an_install_without_kernels_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cpu_library.ENVIRONMENT, raising=False)
    monkeypatch.setattr(cpu_library, "FOLDER", tmp_path)
    assert "the package was not built here" in (cpu_library.selection.__wrapped__().problem or "")
    (tmp_path / "build.json").write_text(json.dumps({"failed": {"baseline": "no C++ compiler was found (looked for g++)"}}))
    problem = cpu_library.selection.__wrapped__().problem or ""
    assert "no C++ compiler was found (looked for g++)" in problem
    assert "Install g++ or clang" in problem


@pytest.mark.skipif(not hasattr(_ctypes, "__file__"), reason="this Python has ctypes inside, so there is no other object at hand")
def test_an_object_of_other_sources_is_a_reason_and_no_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As an editable install keeps it from an older checkout."""
    monkeypatch.delenv(cpu_library.ENVIRONMENT, raising=False)
    monkeypatch.setattr(cpu_library, "FOLDER", tmp_path)
    monkeypatch.setattr(cpu_library, "_runnable", cpu_library._runnable.__wrapped__)
    shutil.copy(_ctypes.__file__, tmp_path / "libditattn_cpu_baseline.so")
    problem = cpu_library.selection.__wrapped__().problem or ""
    assert "built from other sources" in problem
    assert "undefined symbol: ditattn_runnable_variants" in problem
    assert "pip install --force-reinstall" in problem


def test_the_table_tells_a_missing_kernel_from_a_refused_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditattn.ops.table._resolve", lambda target: lambda *_: "the CPU kernels are missing: no compiler")
    facts = CallFacts("cpu", torch.float32, 64)
    assert any(v.reason == "the CPU kernels are missing: no compiler" for v in explain(TABLE, facts))
    assert choose.__wrapped__(TABLE, facts).name == "torch"
    with pytest.raises(BackendUnavailable, match="no compiler"):
        choose.__wrapped__(TABLE, facts, ("cpu",))
    with pytest.raises(UnsupportedCall, match=r"takes head sizes 8, 16, \.\.\. 128, not 256"):
        choose.__wrapped__(TABLE, CallFacts("cpu", torch.float32, 256), ("cpu",))


# --- plans ------------------------------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[Case, torch.Tensor, torch.dtype]:
    heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    lengths = {"query_length": draw(st.integers(1, 400)), "key_length": draw(st.integers(1, 700))}
    case = Case(
        "drawn", heads=heads[0], key_heads=heads[1], dim=draw(st.sampled_from([32, 64, 72, 96, 128])), causal=draw(st.booleans()), **lengths
    )
    shape = (1, draw(st.sampled_from([1, heads[0]])), num_blocks(case.query_length), num_blocks(case.key_length))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.1, 0.5, 1.0]))
    return case, mask, draw(st.sampled_from(cpu_checks.DTYPES))


@needs_kernel
@settings(max_examples=60)
@given(problems())
def test_drawn_plans(drawn: tuple[Case, torch.Tensor, torch.dtype]) -> None:
    case, mask, dtype = drawn
    plan = BlockPlan.from_mask(mask, case.query_length, case.key_length)
    problem = build(case, dtype)
    problem = type(problem)(**{**vars(problem), "plan": plan})
    for name in [name for name in judge.possible(TABLE, judge.facts_of(case, "cpu", dtype)) if name.startswith("cpu")]:
        out = block_sparse_attention(problem.query, problem.key, problem.value, plan, causal=case.causal, implementation=name)
        judge.check_output(out, problem, judge.coarser(TABLE, name))


@needs_kernel
@pytest.mark.parametrize(
    ("field", "value", "text"), [("counts", -1, "counts"), ("counts", 9, "counts"), ("indices", 7, "0..2"), ("indices", -5, "0..2")]
)
def test_bad_values_are_refused_before_the_kernel_runs(field: str, value: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = build(Case("bad", plan="full"), torch.float32)
    getattr(problem.plan, field)[0, 0, 0] = value
    monkeypatch.setattr("ditattn.ops.cpu_call._run", lambda *_: pytest.fail("the kernel was called"))
    with pytest.raises(UnsupportedCall, match=text):
        block_sparse_attention(problem.query, problem.key, problem.value, problem.plan, implementation="cpu")


@needs_kernel
@given(st.data())
@settings(max_examples=200, deadline=None)
def test_the_quick_look_at_a_plan_finds_what_the_check_finds(data: st.DataObject) -> None:
    """Small numbers written anywhere into a good plan: some leave it good."""
    plan = BlockPlan.from_mask(
        torch.rand(1, 2, 3, 4, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) < 0.6, 300, 500
    )
    for _ in range(data.draw(st.integers(0, 2))):
        tensor = data.draw(st.sampled_from([plan.indices, plan.counts]))
        tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = data.draw(st.integers(-2, 5))
    assert cpu_call._is_valid(plan, 1, 2) == (next(plan._problems(1, 2), None) is None)


@needs_kernel
@pytest.mark.parametrize("order", [[0], [1, 0, 2], [0, 0], [0, 2], [-1, 0], [2**40, 0]], ids=str)
def test_a_token_order_is_followed_only_if_it_is_a_permutation(order: list[int]) -> None:
    tensor = torch.tensor(order, dtype=torch.int64)
    if sorted(order) == list(range(len(order))):
        assert torch.equal(cpu_call._permutation(tensor, len(order), 1), tensor)
        return
    with pytest.raises(UnsupportedCall, match=rf"no permutation of 0 \.\. {len(order) - 1}"):
        cpu_call._permutation(tensor, len(order), 1)


@needs_kernel
def test_every_heads_order_is_looked_at() -> None:
    good = torch.tensor([[0, 1, 2], [2, 0, 1]])
    assert torch.equal(cpu_call._permutation(good, 3, 4), good)
    with pytest.raises(UnsupportedCall, match="no permutation"):
        cpu_call._permutation(torch.tensor([[0, 1, 2], [2, 0, 2]]), 3, 4)
    with pytest.raises(UnsupportedCall, match="key heads that divide 3"):
        cpu_call._permutation(good, 3, 3)


@needs_kernel
def test_negative_and_zero_scales() -> None:
    for scale in (-0.3, 0.0):
        for dtype in (torch.float32, torch.bfloat16):
            cpu_checks.check_case(Case("scale", scale=scale, plan="uneven"), dtype)


# --- threads and processes --------------------------------------------------------------------------------------------------------------


def _call(problem: object, order: TokenOrder | None = None) -> torch.Tensor:
    tensors = (problem.query, problem.key, problem.value)
    return block_sparse_attention(*tensors, problem.plan, order=order, tail=problem.tail, implementation="cpu")


@needs_kernel
@pytest.mark.parametrize("dtype", cpu_checks.DTYPES)
def test_same_bits_whatever_the_number_of_threads(dtype: torch.dtype) -> None:
    problem = build(Case("threads", heads=3, key_heads=3, plan="uneven", query_length=700, key_length=700), dtype)
    results = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        results.append(_call(problem))
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_kernel
@pytest.mark.parametrize("dtype", cpu_checks.DTYPES)
def test_same_bits_with_a_tail_and_orders_whatever_the_number_of_threads(dtype: torch.dtype) -> None:
    problem = build(Case("threads", heads=4, key_heads=2, plan="uneven", query_length=700, key_length=700, tail=True), dtype)
    forward = torch.stack([torch.randperm(700), torch.randperm(700)])
    order = TokenOrder(forward, forward.argsort(-1), (0, 1), (0, 700), 700)
    results = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        results.append(_call(problem, order))
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_kernel
def test_a_tail_and_a_scale_that_are_too_far_apart_are_refused() -> None:
    p = build(Case("small scale", plan="uneven", tail=True), torch.float32)
    with pytest.raises(UnsupportedCall, match="takes scales from 1e-30 on and zero, not 1e-31"):
        block_sparse_attention(p.query, p.key, p.value, p.plan, tail=p.tail, scale=1e-31, implementation="cpu")
    out, expected = (
        block_sparse_attention(p.query, p.key, p.value, p.plan, tail=p.tail, scale=1e-29, implementation=name)
        for name in ("cpu", "reference")
    )
    assert judge.relative_error(out, expected.double()) < 1e-6


@needs_kernel
def test_calls_from_several_python_threads_at_once() -> None:
    given_problems = [build(Case("at once", plan="uneven", query_length=200 + 20 * i, key_length=300), torch.bfloat16) for i in range(16)]
    alone = [_call(problem) for problem in given_problems]
    begin = threading.Barrier(16)

    def at_once(problem: object) -> list[torch.Tensor]:
        begin.wait()
        return [_call(problem) for _ in range(4)]

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(at_once, given_problems))
    for expected, results in zip(alone, together, strict=True):
        assert all(torch.equal(result, expected) for result in results)


@needs_kernel
def test_torch_and_the_kernel_take_turns_on_the_matrix_registers() -> None:
    problem = build(Case("turns", plan="full", query_length=256, key_length=256), torch.bfloat16)
    x = torch.randn(256, 256).bfloat16()
    product, out = x @ x, _call(problem)
    for _ in range(5):
        assert torch.equal(_call(problem), out)
        assert torch.equal(x @ x, product)


def _in_child(problem: object, expected: torch.Tensor) -> None:
    torch.set_num_threads(2)
    out = _call(problem)
    # torch's own operations must not start OpenMP threads in a forked process, where they can wait for ever
    torch.set_num_threads(1)
    sys.exit(0 if torch.equal(out, expected) else 1)


@needs_kernel
def test_after_fork() -> None:
    problem = build(Case("fork", plan="uneven"), torch.bfloat16)
    process = multiprocessing.get_context("fork").Process(target=_in_child, args=(problem, _call(problem)))
    process.start()
    process.join(60)
    finished = process.exitcode
    process.kill()
    assert finished == 0


FORKED = CallFacts("cpu", torch.float32, 32, frozenset({"causal", "gqa"}))


def _measure_in_child() -> None:
    torch.set_num_threads(1)
    sys.exit(0 if preference.dense_on_cpu(FORKED).cpu_ms > 0 else 1)


@needs_kernel
def test_a_child_forked_during_the_self_measurement_measures_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no such thread to wait for."""
    parent, begun, forked, measure = os.getpid(), threading.Event(), threading.Event(), preference._measure

    def measure_slowly(*arguments: object) -> preference.Measurement:
        if os.getpid() == parent:
            begun.set()
            forked.wait(60)
        return measure(*arguments)

    monkeypatch.setattr(preference, "_measure", measure_slowly)
    thread = threading.Thread(target=preference.dense_on_cpu, args=(FORKED,))
    thread.start()
    assert begun.wait(60)
    process = multiprocessing.get_context("fork").Process(target=_measure_in_child)
    process.start()
    process.join(60)
    finished = process.exitcode
    process.kill()
    forked.set()
    thread.join()
    assert finished == 0


@needs_kernel
def test_threads_that_ask_at_once_get_one_answer() -> None:
    facts = CallFacts("cpu", torch.float32, 128, frozenset({"causal", "gqa"}))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(preference.dense_on_cpu, [facts] * 4))
    assert all(answer is answers[0] for answer in answers)


def test_torch_is_preferred_where_it_wins_clearly() -> None:
    assert [preference.Measurement("", cpu_ms, 1.0).preferred for cpu_ms in (0.5, 1.2, 1.3)] == ["cpu", "cpu", "torch"]


class Attending(torch.utils.data.Dataset):
    """Each item is an attention call."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return _call(build(Case("item", plan="uneven", query_length=100 + index), torch.bfloat16)).float().sum()


@needs_kernel
def test_in_a_data_loader_worker() -> None:
    loaded = [item for batch in torch.utils.data.DataLoader(Attending(), num_workers=1, batch_size=2) for item in batch]
    assert [item.item() for item in loaded] == [Attending()[i].item() for i in range(4)]


LONG_CALL = """
import signal, sys, threading, time, torch
# a shell that starts the tests in the background ignores SIGINT, and children inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
from ditattn.ops.dense_attention import dense_attention
x = torch.zeros(1, 200_000, 8, 64)
ticks = 0
def tick():
    global ticks
    while True:
        time.sleep(0.01)
        ticks += 1
threading.Thread(target=tick, daemon=True).start()
print("calling", flush=True)
try:
    dense_attention(x, x, x, implementation="cpu")
except KeyboardInterrupt:
    print("interrupted", ticks, flush=True)
"""


@needs_kernel
def test_ctrl_c_is_answered_within_a_second_and_the_gil_is_free() -> None:
    child = subprocess.Popen([sys.executable, "-c", LONG_CALL], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "calling\n"
    time.sleep(1.5)
    asked = time.monotonic()
    child.send_signal(signal.SIGINT)
    word, ticks = child.stdout.readline().split()
    waited = time.monotonic() - asked
    # how the interpreter ends after that is not ours: on a busy machine it was once seen to end by the signal
    child.wait(30)
    assert word == "interrupted"
    assert waited < 1, f"waited {waited:.2f} s"
    # another Python thread ran during the call
    assert int(ticks) > 20


# --- choice -----------------------------------------------------------------------------------------------------------------------------


@needs_kernel
def test_the_dense_choice_is_measured_once_and_shown() -> None:
    facts = CallFacts("cpu", torch.float32, 96, frozenset({"causal"}))
    first = preference.dense_on_cpu(facts)
    assert preference.dense_on_cpu(facts) is first
    assert min(first.cpu_ms, first.torch_ms) > 0
    verdict = next(v for v in explain(DENSE_TABLE, facts) if v.implementation.name == "cpu")
    assert verdict.note == first.sentence()
    assert choose.__wrapped__(DENSE_TABLE, facts).name == first.preferred


@needs_kernel
def test_fast_fp32_runs_only_by_name() -> None:
    assert choose(TABLE, CallFacts("cpu", torch.float32, 64)).name == "cpu"
    if cpu_library.bf16_problem():
        with pytest.raises(BackendUnavailable, match="needs bf16 instructions"):
            choose(TABLE, CallFacts("cpu", torch.float32, 64), ("cpu_fast_fp32",))
        return
    problem = build(Case("fast"), torch.float32)
    fast, exact = (dense_attention(problem.query, problem.key, problem.value, implementation=n) for n in ("cpu_fast_fp32", "cpu"))
    assert 1e-4 < judge.relative_error(fast, exact.double()) < 2e-2


@needs_kernel
@pytest.mark.parametrize(("name", "largest_error"), [("cpu_bf16x3", 3e-5), ("cpu_bf16x6", 1e-6)])
@pytest.mark.parametrize("table", [TABLE, DENSE_TABLE], ids=["sparse", "dense"])
def test_bf16_parts_run_only_by_name_and_on_a_tile_unit(name: str, largest_error: float, table: tuple[Implementation, ...]) -> None:
    assert choose(table, CallFacts("cpu", torch.float32, 64)).name in ("cpu", "torch")
    if cpu_library.parts_problem():
        with pytest.raises(BackendUnavailable, match=r"needs the tile unit \(amx\): .*several bf16 products take longer than one of fp32"):
            choose(table, CallFacts("cpu", torch.float32, 64), (name,))
        return
    problem = build(Case("parts"), torch.float32)
    parts, exact = (dense_attention(problem.query, problem.key, problem.value, implementation=n) for n in (name, "reference"))
    assert largest_error / 100 < judge.relative_error(parts, exact.double()) < largest_error


def test_why_there_is_no_tile_unit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    library = cpu_library.Library("avx512bf16", 1, None)
    chosen = cpu_library.Selection(library, None, {"amx": "the operating system does not permit the registers of 'amx'"})
    monkeypatch.setattr(cpu_library, "selection", lambda: chosen)
    assert "(amx): the operating system does not permit the registers of 'amx'." in (cpu_library.parts_problem() or "")
    chosen = cpu_library.Selection(library, None, {})
    assert "(amx): the kernels chosen here are 'avx512bf16'." in (cpu_library.parts_problem() or "")
    chosen = cpu_library.Selection(replace(library, most_bf16_parts=3), None, {})
    assert cpu_library.parts_problem() is None
    chosen = cpu_library.Selection(None, "no compiler", {})
    assert cpu_library.parts_problem() == "no compiler"


# --- builds -----------------------------------------------------------------------------------------------------------------------------


def test_build_without_a_compiler_succeeds_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    folder = tmp_path / "ditattn/ops/native"
    folder.mkdir(parents=True)
    (folder / "libditattn_cpu_baseline.so").write_text("of an earlier build")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "temp")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "CXX": "/nonexistent"})
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob("*.so"))
    report = json.loads((folder / "build.json").read_text())
    assert report["failed"]["baseline"] == "no C++ compiler was found (looked for /nonexistent)"


@needs_kernel
def test_every_variant_was_compiled() -> None:
    report = json.loads((cpu_library.FOLDER / "build.json").read_text())
    assert report["failed"] == {}


def test_threads_of_the_interpreter_are_left_alone() -> None:
    """The self-measurement's thread and the kernel's threads are gone after a call."""
    assert all(thread.name != "ditattn-self-measurement" for thread in threading.enumerate())
