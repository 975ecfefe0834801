"""When a kept plan serves a call, and when it must not."""

from __future__ import annotations

import pytest

from ditattn.plan.block_plan import BlockPlan
from ditattn.plan.reuse import MAX_UNNAMED, ForwardId, PlanMemory, ReusePolicy

COND, UNCOND = ForwardId(0, "cond"), ForwardId(0, "uncond")
FIRST, SECOND = ForwardId(0, None, 0), ForwardId(0, None, 1)


def made_in(calls: list[tuple[int, ForwardId]], policy: ReusePolicy) -> list[bool]:
    """For every call in turn: whether it had to make a plan."""
    memory, made = PlanMemory(), []
    for step, forward_id in calls:
        plan = memory.find(step, forward_id, "same", policy)
        made.append(plan is None)
        if plan is None:
            memory.keep(BlockPlan.full(256, 256), step, forward_id, "same", policy)
    return made


def steps_of(*forwards: ForwardId, steps: int) -> list[tuple[int, ForwardId]]:
    return [(step, forward_id) for step in range(steps) for forward_id in forwards]


@pytest.mark.parametrize(
    ("calls", "policy", "expected"),
    [
        (steps_of(COND, UNCOND, steps=2), ReusePolicy(), [True] * 4),
        (steps_of(COND, steps=7), ReusePolicy(3), [True, False, False, True, False, False, True]),
        (steps_of(COND, UNCOND, steps=4), ReusePolicy(2), [True, True, False, False] * 2),
        (steps_of(COND, UNCOND, steps=3), ReusePolicy(1, True), [True, False] * 3),
        (steps_of(COND, UNCOND, steps=4), ReusePolicy(2, True), [True, False, False, False] * 2),
        # a branch that joins later never takes the other one's plan
        ([(0, COND), (1, COND), (1, UNCOND), (2, UNCOND)], ReusePolicy(4), [True, False, True, False]),
        # the second forward_id of a step (Heun, a call that is repeated) has tokens of its own
        ([(3, COND), (3, COND), (4, COND)], ReusePolicy(4), [True, True, False]),
        ([(3, COND), (3, UNCOND), (3, COND), (3, UNCOND)], ReusePolicy(1, True), [True, False, True, False]),
        # a step that goes back
        ([(5, COND), (4, COND)], ReusePolicy(4), [True, True]),
        ([(3, COND), (5, COND), (4, COND)], ReusePolicy(4), [True, False, True]),
        ([(3, COND), (5, COND), (4, UNCOND)], ReusePolicy(4, True), [True, False, True]),
        # another run, at a step that would fit
        ([(0, COND), (1, ForwardId(1, "cond"))], ReusePolicy(4), [True, True]),
        ([(1, COND), (1, ForwardId(1, "uncond"))], ReusePolicy(4, True), [True, True]),
        # nobody names the branches: the place in the step tells them apart
        (steps_of(FIRST, SECOND, steps=3), ReusePolicy(3), [True, True, False, False, False, False]),
        (steps_of(FIRST, SECOND, steps=3)[2:], ReusePolicy(1, True), [True, False] * 2),
        # ... up to four of them
        ([(2, ForwardId(0, None, number)) for number in range(6)], ReusePolicy(1, True), [True, False, False, False, True, True]),
        # ... but a second forward at step 0 may be the first one of another run
        (steps_of(FIRST, SECOND, steps=1), ReusePolicy(1, True), [True, True]),
    ],
)
def test_which_calls_make_a_plan(calls: list[tuple[int, ForwardId]], policy: ReusePolicy, expected: list[bool]) -> None:
    assert made_in(calls, policy) == expected


def test_a_plan_for_other_facts_does_not_serve() -> None:
    memory, policy, plan = PlanMemory(), ReusePolicy(4), BlockPlan.full(256, 256)
    memory.keep(plan, 0, COND, ("grid", 256), policy)
    assert memory.find(1, COND, ("grid", 384), policy) is None
    assert memory.find(1, COND, ("grid", 256), policy) is plan


def test_without_reuse_nothing_is_kept_and_one_timestep_for_ever_does_not_fill_the_memory() -> None:
    memory = PlanMemory()
    memory.keep(BlockPlan.full(256, 256), 0, COND, "same", ReusePolicy())
    assert not memory._kept
    for number in range(50):
        memory.keep(BlockPlan.full(256, 256), 0, ForwardId(0, None, number), "same", ReusePolicy(2))
    assert len(memory._kept) == MAX_UNNAMED
    memory.forget()
    assert not memory._kept
