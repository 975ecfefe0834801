"""Which step it is, from every source and in their order."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ditattn.runtime.step import Step, StepClock, step


def scheduler(step_index: int | None, num_steps: int = 4, begin_index: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(timesteps=torch.arange(num_steps), step_index=step_index, _step_index=step_index, begin_index=begin_index)


def context(step_index: int | None) -> SimpleNamespace:
    return SimpleNamespace(name="cond", step_index=step_index, num_inference_steps=9)


def indices(clock: StepClock, timesteps: list[Any]) -> list[int | None]:
    return [clock.read(None, None, timestep).index for timestep in timesteps]


def test_the_best_source_wins() -> None:
    clock = StepClock(lambda: scheduler(2))
    with step(7, 8):
        assert clock.read(context(5), "cond", 900) == Step(7, 8, "override")
    assert clock.read(context(5), "cond", 900) == Step(5, 9, "cache_context")
    assert clock.read(context(None), "cond", 900) == Step(2, 4, "scheduler")
    assert clock.read("cond", "cond", 900) == Step(2, 4, "scheduler")
    assert StepClock().read("cond", "cond", 900) == Step(0, None, "timestep")
    assert StepClock().read(None, None, None) == Step(None, None, "none")


def test_a_context_that_does_not_know_the_number_of_steps_leaves_it_to_the_scheduler() -> None:
    partial = SimpleNamespace(step_index=5, num_inference_steps=None)
    assert StepClock(lambda: scheduler(2)).read(partial, "cond", 900) == Step(5, 4, "cache_context")


def test_a_scheduler_before_its_first_step_is_at_step_zero_in_both_branches() -> None:
    clock = StepClock(lambda: scheduler(None))
    assert [clock.read(None, branch, 900) for branch in ("cond", "uncond")] == [Step(0, 4, "scheduler")] * 2
    # pipelines without branch names call twice before the first step
    clock = StepClock(lambda: scheduler(None))
    assert indices(clock, [900, 900]) == [0, 0]


def test_a_truncated_schedule_begins_where_it_begins() -> None:
    assert StepClock(lambda: scheduler(None, begin_index=3)).read(None, None, 900).index == 3


def test_a_scheduler_that_nobody_steps_gives_way_to_the_timesteps() -> None:
    # SkyReels-V2 steps deep copies: the pipeline's own scheduler never leaves None
    clock = StepClock(lambda: scheduler(None))
    steps = [clock.read(None, "cond", timestep) for timestep in (900, 600, 300)]
    assert [(found.index, found.source) for found in steps] == [(0, "scheduler"), (1, "timestep"), (2, "timestep")]


def test_a_scheduler_without_a_step_index_still_tells_the_number_of_steps() -> None:
    # CogVideoX's DPM and DDIM schedulers
    clock = StepClock(lambda: SimpleNamespace(timesteps=torch.arange(6)))
    assert clock.read(None, None, 900) == Step(0, 6, "timestep")


def schedule(*timesteps: float, **attributes: Any) -> SimpleNamespace:
    config = SimpleNamespace(num_train_timesteps=1000)
    return SimpleNamespace(timesteps=torch.tensor(timesteps), config=config, **attributes)


NOBODY_STEPPED = {"step_index": None, "_step_index": None, "begin_index": None}


@pytest.mark.parametrize(
    "form", [lambda t: t, lambda t: t / 1000, lambda t: torch.tensor([t]).bfloat16() / 1000], ids=["t", "share", "bf16"]
)
def test_a_run_that_begins_in_the_middle_begins_with_a_later_step(form: Any) -> None:
    # UniPC in WanVideoToVideoPipeline: nobody sets begin_index, and step_index is None until the first step() has ended
    clock = StepClock(lambda: schedule(1000.0, 900.0, 600.0, 300.0, **NOBODY_STEPPED))
    assert clock.read(None, None, form(600.0)) == Step(2, 4, "scheduler")


def test_a_share_of_one_is_the_first_step_also_where_the_last_timestep_is_one() -> None:
    # AuraFlow: the schedule ends at sigma 0.001, which is timestep 1, and the model takes timestep / 1000
    clock = StepClock(lambda: schedule(1000.0, 500.5, 1.0, **NOBODY_STEPPED))
    assert clock.read(None, None, torch.tensor([1.0])) == Step(0, 3, "scheduler")
    # a model that takes the timestep itself, whose pipeline steps a copy of the scheduler
    clock.reset()
    assert [clock.read(None, None, t).index for t in (1000.0, 500.5, 1.0)] == [0, 1, 2]


def test_schedulers_without_a_step_index_are_read_by_the_place_of_the_timestep() -> None:
    # CogVideoX's DPM and DDIM schedulers, video to video
    clock = StepClock(lambda: schedule(999.0, 749.0, 499.0, 249.0))
    assert [clock.read(None, None, t) for t in (499, 249)] == [Step(2, 4, "schedule"), Step(3, 4, "schedule")]


def test_the_running_pipelines_scheduler_counts() -> None:
    own, other = scheduler(3), scheduler(1, num_steps=9)
    assert StepClock(lambda: own).read(None, None, 900, other) == Step(1, 9, "scheduler")


def test_a_scheduler_that_another_loop_left_behind_is_not_believed() -> None:
    # it has run to its end, or stands still while the timesteps fall
    assert indices(StepClock(lambda: scheduler(4)), [900, 600, 300]) == [0, 1, 2]
    clock = StepClock(lambda: scheduler(2))
    found = [clock.read(None, None, timestep) for timestep in (900, 900, 600, 300)]
    assert [(one.index, one.num_steps) for one in found] == [(2, 4), (2, 4), (1, None), (2, None)]


def test_the_scheduler_is_looked_up_at_every_forward() -> None:
    holder = SimpleNamespace(scheduler=scheduler(1))
    clock = StepClock(lambda: holder.scheduler)
    assert clock.read(None, None, 900).index == 1
    holder.scheduler = scheduler(3)
    assert clock.read(None, None, 900).index == 3


@pytest.mark.parametrize("kind", ["number", "scalar", "batch", "per token"])
def test_timesteps_count_down_and_a_rise_is_a_new_run(kind: str) -> None:
    def form(value: float) -> Any:
        if kind == "number":
            return value
        if kind == "scalar":
            return torch.tensor(value)
        # the tokens of a given image stand at 0 in every step
        return torch.full((2,), value) if kind == "batch" else torch.tensor([[0.0, value, value]])

    assert indices(StepClock(), [form(t) for t in (900.0, 900.0, 600.0, 600.0, 300.0, 950.0, 500.0)]) == [0, 0, 1, 1, 2, 0, 1]


def test_reset_begins_a_new_run() -> None:
    clock = StepClock()
    assert indices(clock, [900, 600]) == [0, 1]
    clock.reset()
    assert indices(clock, [500, 400]) == [0, 1]


def test_an_override_ends_with_its_block_and_nests() -> None:
    clock = StepClock()
    with step(1):
        with step(2, 3):
            assert clock.read(None, None, 900) == Step(2, 3, "override")
        assert clock.read(None, None, 900) == Step(1, None, "override")
    assert clock.read(None, None, 900).source == "timestep"


def test_an_override_ends_with_an_exception_too() -> None:
    with pytest.raises(ZeroDivisionError), step(1):
        raise ZeroDivisionError
    assert StepClock().read(None, None, 900).source == "timestep"


def test_an_override_holds_in_its_own_thread_only() -> None:
    found: list[Step] = []
    with step(3):
        thread = threading.Thread(target=lambda: found.append(StepClock().read(None, None, 900)))
        thread.start()
        thread.join()
    assert found[0].source == "timestep"


@pytest.mark.parametrize(("index", "num_steps"), [(-1, None), (4, 4), (0, 0)])
def test_an_impossible_step_is_refused(index: int, num_steps: int | None) -> None:
    with pytest.raises(ValueError, match="step"), step(index, num_steps):
        pass
