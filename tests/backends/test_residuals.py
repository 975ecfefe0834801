"""What a sparse step gets from the last dense one: the budget of a run, what is kept, and what it does to the error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import judge
import oracle
from ditattn.backends.base import CallRecord
from ditattn.backends.permuted_sparse_attn import PermutedSparseAttentionBackend, PermutedSparseAttentionConfig, refresh_steps
from ditattn.backends.residuals import LEAST_DENSITY, LEAST_SPARSE_STEPS, LEAST_SPARSITY, LEAST_STEPS_FOR_REFRESH, Residuals, refreshes
from ditattn.backends.sparse import Reason
from ditattn.plan.reuse import ForwardId
from sparse_calls import draw

GRID = (5, 16, 16)
LENGTH = 5 * 256
NUM_STEPS = 24
FIRST = 5
LAYER: dict[str, Any] = {"sparsity": 0.75, "skip_first_steps": FIRST, "num_steps": NUM_STEPS, "forward_id": ForwardId()}


@given(st.floats(0, 0.99), st.integers(0, 40), st.integers(1, 120), st.booleans())
def test_a_run_computes_what_was_asked(sparsity: float, first: int, length: int, is_video: bool) -> None:
    spent = refreshes(sparsity, first, first + length, is_video=is_video)
    if not is_video or length < LEAST_STEPS_FOR_REFRESH:
        assert not spent.steps
    assert all(first <= step < first + length for step in spent.steps)
    assert all(step + 1 not in spent.steps and step + 1 < first + length for step in spent.before_sparse)
    if length < LEAST_SPARSE_STEPS or sparsity < LEAST_SPARSITY:
        assert (spent.steps, spent.before_sparse, spent.sparsity) == (frozenset(), frozenset(), sparsity)
        return
    density = 1 - spent.sparsity
    computed = len(spent.steps) + (length - len(spent.steps) + len(spent.before_sparse)) * density
    assert computed == pytest.approx((1 - sparsity) * length)
    assert not spent.steps or density >= LEAST_DENSITY * 0.9


def test_dense_steps_stand_closer_together_at_the_beginning() -> None:
    spent = refreshes(0.645, 5, 24)
    assert sorted(spent.steps) == [7, 11, 16]
    assert sorted(spent.before_sparse) == [4, 7, 11, 16]


def test_what_was_kept_is_added_and_fades() -> None:
    residual, out = draw(2, 200, 3, 32, seed=1), draw(2, 200, 3, 32, seed=2)
    kept, where = Residuals(), ForwardId(1, "cond", 0)
    kept.keep(residual, 4, 24, where, "facts")
    added = [kept.added(out.clone(), step, where, "facts") - out for step in (5, 8)]
    shares = [float((each * residual).sum() / residual.square().sum()) for each in added]
    assert 0.85 < shares[0] < 0.95
    assert shares[1] == pytest.approx(shares[0] ** 4, rel=1e-2)
    assert float((added[0] - shares[0] * residual).abs().max()) < float(residual.abs().max()) / 127


def test_it_makes_no_difference_how_many_tokens_go_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    out, kept, where = draw(2, 200, 3, 32, seed=2), Residuals(), ForwardId(1, "cond", 0)
    kept.keep(draw(2, 200, 3, 32, seed=1), 4, 24, where, "facts")
    whole = kept.added(out.clone(), 5, where, "facts")
    monkeypatch.setattr("ditattn.backends.residuals.CHUNK", 2 * 3 * 32 * 7)
    assert torch.equal(kept.added(out.clone(), 5, where, "facts"), whole)
    assert not torch.equal(whole, out)


def test_they_are_kept_and_added_where_gradients_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditattn.backends.residuals.CHUNK", 2 * 3 * 32 * 7)
    plain, recorded, where = Residuals(), Residuals(), ForwardId()
    residual, out = draw(2, 200, 3, 32, seed=1), draw(2, 200, 3, 32, seed=2)
    for step in (4, 7):
        plain.keep(residual, step, 24, where, "facts")
        recorded.keep(residual.clone().requires_grad_() * 1, step, 24, where, "facts")
    added = recorded.added(out.clone().requires_grad_() * 1, 8, where, "facts")
    assert added.requires_grad
    assert torch.equal(added, plain.added(out.clone(), 8, where, "facts"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_keeps_its_dtype(dtype: torch.dtype) -> None:
    kept, where = Residuals(), ForwardId()
    kept.keep(draw(1, 200, 3, 32, dtype=dtype), 4, 24, where, "facts")
    assert kept.added(draw(1, 200, 3, 32, dtype=dtype), 5, where, "facts").dtype == dtype


def test_a_batch_that_loses_a_branch_gets_nothing() -> None:
    """Guidance that ends within a run: one element would otherwise get the residual of both, or torch would spread it over them."""
    kept, where = Residuals(), ForwardId()
    kept.keep(draw(2, 200, 3, 32, seed=1), 4, 24, where, "facts")
    alone = draw(1, 200, 3, 32, seed=2)
    assert torch.equal(kept.added(alone.clone(), 5, where, "facts"), alone)
    kept.keep(draw(1, 200, 3, 32, seed=3), 6, 24, where, "facts")
    assert kept.added(alone, 7, where, "facts").shape == alone.shape
    both = draw(2, 200, 3, 32, seed=4)
    assert torch.equal(kept.added(both.clone(), 7, where, "facts"), both)


def test_a_second_residual_tells_how_fast_the_first_one_faded() -> None:
    first = draw(1, 500, 2, 32, seed=1)
    kept, where = Residuals(), ForwardId()
    kept.keep(first, 4, 24, where, "facts")
    second = torch.stack([0.25 * first[:, :, 0], -first[:, :, 1]], 2)
    kept.keep(second, 6, 24, where, "facts")
    added = kept.added(torch.zeros_like(first), 7, where, "facts")
    shares = (added * second).sum((0, 1, 3)) / second.square().sum((0, 1, 3))
    assert float(shares[0]) == pytest.approx(0.5, rel=1e-2), "to a quarter in two steps"
    assert float(shares[1]) == pytest.approx(0.05**0.5, rel=1e-2), "the opposite explains nothing"


@pytest.mark.parametrize(
    ("step", "where", "facts"),
    [
        (5, ForwardId(1, "uncond", 0), "facts"),
        (5, ForwardId(1, "cond", 1), "facts"),
        (5, ForwardId(2, "cond", 0), "facts"),
        (5, ForwardId(1, "cond", 0), "another grid"),
        (4, ForwardId(1, "cond", 0), "facts"),
        (0, ForwardId(1, "cond", 0), "facts"),
    ],
)
def test_another_branch_run_grid_or_an_earlier_step_gets_nothing(step: int, where: ForwardId, facts: str) -> None:
    kept, out = Residuals(), draw(1, 200, 2, 32)
    kept.keep(draw(1, 200, 2, 32, seed=1), 4, 24, ForwardId(1, "cond", 0), "facts")
    assert torch.equal(kept.added(out.clone(), step, where, facts), out)
    kept.forget()
    assert torch.equal(kept.added(out.clone(), 5, ForwardId(1, "cond", 0), "facts"), out)


class Run:
    """One layer of a run, on tensors that drift a little from step to step."""

    def __init__(self, **keys: Any) -> None:
        self.keys = {**LAYER, **keys}
        self.records: list[CallRecord] = []
        self.impl = PermutedSparseAttentionBackend.get_impl_cls()(2, 32, layer_index=0, observer=self.records.append)
        self.outputs: dict[int, Tensor] = {}

    def tensors(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (2 * draw(1, LENGTH, 2, 32, seed=i) + 0.1 * draw(1, LENGTH, 2, 32, seed=100 * step + i) for i in range(3))
        return q, k, v

    def step(self, step: int) -> None:
        tensors = self.tensors(step)
        built = PermutedSparseAttentionBackend.get_builder_cls()().build(
            current_timestep=step, raw_latent_shape=(1, 4, *GRID), patch_size=1, **self.keys
        )
        self.outputs[step] = self.impl.forward(*tensors, built)

    def error(self, step: int) -> float:
        """Against dense attention."""
        return judge.relative_error(self.outputs[step], oracle.attention(*self.tensors(step))[0])

    def steps(self, *steps: int) -> Run:
        for step in steps:
            self.step(step)
        return self


def test_some_steps_are_dense_and_the_run_computes_what_was_asked() -> None:
    run = Run(first_frame_sink=False, sparsity=0.6).steps(*range(NUM_STEPS))
    spent = refreshes(0.6, FIRST, NUM_STEPS)
    reasons = [record.reason for record in run.records]
    assert [step for step, reason in enumerate(reasons) if reason == Reason.REFRESH] == sorted(spent.steps)
    assert reasons[:FIRST] == [Reason.FIRST_STEPS] * FIRST
    assert {step for step, record in enumerate(run.records) if record.beside is not None} == spent.before_sparse
    plans = [plan for record in run.records for plan in (record.plan, record.beside) if plan is not None]
    dense = sum(record.plan is None for record in run.records)
    assert dense + sum(plan.density() for plan in plans) == pytest.approx(FIRST + 0.4 * (NUM_STEPS - FIRST), rel=0.02)


def test_sparse_steps_come_nearer_to_dense_ones() -> None:
    """With the same blocks: only what the last dense step lacked is added."""
    first = refreshes(0.75, FIRST, NUM_STEPS)
    plain = Run(residual=False, sparsity=first.sparsity).steps(4, 5, 6)
    better = Run().steps(4, 5, 6)
    assert plain.records[-1].plan.density() == pytest.approx(better.records[-1].plan.density(), abs=1e-3)
    for step in (5, 6):
        assert better.error(step) < 0.7 * plain.error(step)


@pytest.mark.parametrize(
    "keys",
    [
        {"residual": False},
        {"num_steps": 12},
        {"num_steps": None},
        {"sparsity": 0.3},
        {"skip_last_steps": 12},
        {"forward_id": None},
        {"forward_id": ForwardId(number=4)},
    ],
    ids=str,
)
def test_runs_that_do_without(keys: dict[str, Any]) -> None:
    run = Run(**keys).steps(*range(NUM_STEPS if keys.get("num_steps", NUM_STEPS) is None else keys.get("num_steps", NUM_STEPS)))
    assert all(record.beside is None and record.reason != Reason.REFRESH for record in run.records)
    assert not run.impl._residuals._kept


def test_a_run_that_begins_in_the_middle_has_its_first_residual_at_the_next_dense_step() -> None:
    middle = sorted(refreshes(0.75, FIRST, NUM_STEPS).steps)[-1]
    run = Run().steps(*range(middle - 2, middle + 2))
    assert [record.reason for record in run.records] == [None, None, Reason.REFRESH, None]
    assert run.error(middle + 1) < run.error(middle - 1)


def test_layers_that_never_run_sparse_keep_nothing() -> None:
    run = Run(skip_layers="0").steps(*range(NUM_STEPS))
    assert {record.reason for record in run.records} == {Reason.FIRST_STEPS, Reason.SKIPPED_LAYER}
    assert not run.impl._residuals._kept


def test_auto_asks_the_memory_of_the_device(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    one = LENGTH * 2 * 32
    for memory, expected in ((one * 256, True), (one * 256 - 256, False), (None, True)):
        refresh_steps._has_room.cache_clear()
        monkeypatch.setattr(refresh_steps, "_memory_bytes", lambda _, memory=memory: memory)
        caplog.clear()
        with caplog.at_level("WARNING", "ditattn"):
            run = Run().steps(4)
        assert (run.records[0].beside is not None) is expected
        assert ("does without residuals" in caplog.text) is not expected
    monkeypatch.setattr(refresh_steps, "_memory_bytes", lambda _: 1)
    assert Run(residual=True).steps(4).records[0].beside is not None
    refresh_steps._has_room.cache_clear()


def test_the_end_of_a_run_releases_them() -> None:
    run = Run().steps(4)
    assert run.impl._residuals._kept
    run.impl.end_run()
    assert not run.impl._residuals._kept


def test_nan_reaches_the_output() -> None:
    residual = draw(1, 200, 2, 32)
    residual[0, 7, 1, 3] = torch.nan
    kept, where = Residuals(), ForwardId()
    kept.keep(residual, 4, 24, where, "facts")
    added = kept.added(torch.zeros_like(residual), 5, where, "facts")
    assert bool(added[0, 7, 1].isnan().all())
    assert bool(added[0, :7].isfinite().all())


def test_the_key_is_read_from_words() -> None:
    for word, expected in (("auto", "auto"), ("false", False), ("true", True), (False, False)):
        assert PermutedSparseAttentionConfig.from_mapping({"residual": word}).residual == expected
