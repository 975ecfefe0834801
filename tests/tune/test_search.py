"""The search on invented objectives whose optimum is known by trying everything."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from ditattn.errors import ConfigError
from ditattn.runtime.probe import CellReading
from ditattn.tune.candidate import Candidate, Outcome, Target
from ditattn.tune.search import Search, disagreements
from ditattn.tune.sensitivity import PROBED_SPARSITIES, SPARSITIES, Sensitivity

STEPS, LAYERS = 10, 4


def error(step: int, layer: int, sparsity: float) -> float:
    """Early steps and layer 2 suffer most."""
    return sparsity**2 * math.exp(-step / 2) * (4.0 if layer == 2 else 1.0)


def readings(sparsity: float, wrong: bool = False) -> list[CellReading]:
    return [
        CellReading(
            "transformer",
            step,
            layer,
            # a wrong probe takes the last steps for the sensitive ones
            error=error(STEPS - 1 - step if wrong else step, layer, sparsity),
            dropped_mass=sparsity / 2,
            density=1 - sparsity,
            sparse_ms=1.1 - sparsity,
            dense_ms=1.0,
        )
        for step in range(STEPS)
        for layer in range(LAYERS)
    ]


def sensitivity(wrong: bool = False) -> Sensitivity:
    return Sensitivity.from_readings({one: readings(one, wrong) for one in PROBED_SPARSITIES}, attention_share=0.8)


class World:
    """Pixels that follow the errors of the cells that run sparse, and a clock that counts them."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.asked: list[Candidate] = []

    def __call__(self, candidate: Candidate) -> Outcome:
        self.asked.append(candidate)
        return self.outcome(candidate)

    def outcome(self, candidate: Candidate) -> Outcome:
        cells = [
            (step, layer)
            for step in range(candidate.first_steps, STEPS - candidate.last_steps)
            for layer in range(LAYERS)
            if layer not in candidate.layers
        ]
        damage = sum(error(step, layer, candidate.sparsity) for step, layer in cells)
        psnr = math.inf if damage == 0 else 32 - 10 * math.log10(damage)
        time_share = 1 - 0.8 * len(cells) / (STEPS * LAYERS) * (1 - (1.1 - candidate.sparsity))
        return Outcome(psnr, None, time_share, self.target.met_by(psnr, None))

    def optimum(self) -> float:
        """Least time of everything that meets the target."""
        outcomes = [self.outcome(one) for one in sensitivity().candidates()]
        return min(one.time_share for one in outcomes if one.meets)


@pytest.mark.parametrize("psnr", [24, 28, 30, 33, 36, 40])
def test_with_a_true_probe_twelve_runs_find_the_optimum(psnr):
    world = World(Target(psnr))
    found = Search(sensitivity(), world.target, world, budget=12).run()
    assert len(world.asked) <= 12
    assert len(set(world.asked)) == len(world.asked)
    assert world.outcome(found).meets
    assert world.outcome(found).time_share <= world.optimum() + 0.015


@pytest.mark.parametrize("psnr", [28, 33])
def test_with_a_wrong_probe_it_still_meets_the_target_and_says_that_the_probe_erred(psnr):
    world, believed = World(Target(psnr)), sensitivity(wrong=True)
    search = Search(believed, world.target, world, budget=30)
    found = search.run()
    assert found is not None
    assert world.outcome(found).meets
    assert world.outcome(found).time_share < 1
    contradictions, pairs = disagreements(believed, search.outcomes)
    assert 0 < len(contradictions) <= pairs
    a, b = contradictions[0]
    assert believed.damage(a) < believed.damage(b)
    assert world.outcome(a).psnr < world.outcome(b).psnr
    assert disagreements(sensitivity(), search.outcomes)[0] == []


def test_an_interrupted_search_goes_on_where_it_was():
    target = Target(33)
    whole = World(target)
    expected = Search(sensitivity(), target, whole, budget=12).run()
    outcomes: dict[Candidate, Outcome] = {}
    worlds = []
    for stop_after in (1, 3, 2, 100):
        world = World(target)
        worlds.append(world)

        def evaluate(candidate, world=world, stop_after=stop_after):
            if len(world.asked) == stop_after:
                raise KeyboardInterrupt
            return world(candidate)

        search = Search(sensitivity(), target, evaluate, budget=12, outcomes=outcomes)
        try:
            assert search.run() == expected
        except KeyboardInterrupt:
            assert len(worlds) < 4
    assert [one for world in worlds for one in world.asked] == whole.asked


@pytest.mark.parametrize("budget", [1, 2, 3, 5])
def test_the_budget_holds(budget):
    world = World(Target(33))
    Search(sensitivity(), world.target, world, budget=budget, may_drop_first_frame=True).run()
    assert len(world.asked) <= budget


def test_nothing_meets_an_impossible_target():
    world = World(Target(500))
    search = Search(sensitivity(), world.target, world, budget=12)
    assert search.run() is None
    assert world.asked
    assert not any(outcome.meets for outcome in search.outcomes.values())


def test_where_sparse_calls_are_slower_one_run_decides():
    slow = {one: [CellReading("t", 0, 0, one, 0.1, 1 - one, 1.5, 1.0)] for one in PROBED_SPARSITIES}
    asked = []

    def evaluate(candidate):
        asked.append(candidate)
        return Outcome(50.0, None, 1.2, True)

    believed = Sensitivity.from_readings(slow, 0.8)
    assert believed.front() == []
    assert Search(believed, Target(30), evaluate, budget=12).run() is None
    assert len(asked) == 1


def test_the_first_frame_is_dropped_only_where_that_is_allowed_and_helps():
    def evaluate(candidate):
        outcome = World(Target(33)).outcome(candidate)
        return Outcome(outcome.psnr, None, outcome.time_share * (0.9 if not candidate.whole_first_frame else 1), outcome.meets)

    assert Search(sensitivity(), Target(33), evaluate, budget=12).run().whole_first_frame
    found = Search(sensitivity(), Target(33), evaluate, budget=14, may_drop_first_frame=True).run()
    assert not found.whole_first_frame
    assert found.keys["first_frame_sink"] is False


def test_ssim_counts_too():
    assert Target(30, 0.9).met_by(31, 0.95)
    assert not Target(30, 0.9).met_by(31, 0.85)
    assert not Target(30, 0.9).met_by(29, 0.95)
    assert not Target(30, 0.9).met_by(31, None)


def test_damage_and_time_are_those_of_the_cells_that_run_sparse():
    believed = sensitivity()
    one = Candidate(0.6, 3, 1, (2,))
    cells = [(step, layer) for step in range(3, 9) for layer in (0, 1, 3)]
    assert believed.damage(one) == pytest.approx(sum(error(step, layer, 0.6) for step, layer in cells))
    assert believed.time_share(one) == pytest.approx(1 - 0.8 * len(cells) / 40 * (1 - 0.5))
    assert believed.layer_order[0] == 2
    # between probed values damage grows with sparsity
    assert all(np.diff([believed.damage(Candidate(sparsity)) for sparsity in SPARSITIES]) > 0)
    front = believed.front()
    assert all(np.diff([believed.time_share(one) for one in front]) >= 0)
    assert all(np.diff([believed.damage(one) for one in front]) < 0)


def test_bolder_means_bolder_everywhere():
    one = Candidate(0.5, 2, 1, (1, 2))
    assert Candidate(0.6, 2, 1, (1,)).is_bolder_than(one)
    assert Candidate(0.5, 2, 1, (1, 2), whole_first_frame=False).is_bolder_than(one)
    assert not one.is_bolder_than(Candidate(0.5, 2, 1, (1, 2), whole_first_frame=False))
    assert not Candidate(0.6, 3, 1, (1,)).is_bolder_than(one)
    assert not Candidate(0.6, 2, 1, (3,)).is_bolder_than(one)


def test_calls_that_a_step_cache_leaves_out_cost_nothing_and_suffer_nothing():
    """Every second step runs; the last one does not, so that the readings end before the run does."""
    kept = {
        sparsity: [one for one in readings(sparsity) if one.step % 2 == 0 and (one.layer != 3 or one.step == 0)]
        for sparsity in PROBED_SPARSITIES
    }
    believed = Sensitivity.from_readings(kept, 0.8, cached_time_share=0.5, num_steps=STEPS)
    assert believed.num_steps == STEPS
    one = Candidate(0.6, 1, 2, (2,))
    cells = [(step, layer) for step in (2, 4, 6) for layer in (0, 1)]
    assert believed.damage(one) == pytest.approx(sum(error(step, layer, 0.6) for step, layer in cells))
    # of 5 steps x 3 layers, and layer 3 once
    assert believed.time_share(one) == pytest.approx(0.5 * (1 - 0.8 * len(cells) / 16 * (1 - 0.5)))
    assert believed.time_share(Candidate(0.6, 1)) == believed.time_share(Candidate(0.6, 2))
    assert believed.front()
    assert all(believed.time_share(one) < 0.5 for one in believed.front())


def test_sparse_attention_must_beat_the_step_cache_alone():
    believed = replace(sensitivity(), cached_time_share=0.5)
    asked = []

    def no_faster_than_the_cache(candidate):
        asked.append(candidate)
        return Outcome(40.0, None, 0.5, meets=True)

    slow = replace(believed, call_time_shares=(1.0, 0.0))
    assert Search(slow, Target(30), no_faster_than_the_cache, budget=12).run() is None
    assert len(asked) == 1
    assert Search(believed, Target(30), no_faster_than_the_cache, budget=12).run() is not None
    # a cache that costs more than it saves: dense without it is what to beat
    assert replace(sensitivity(), cached_time_share=1.2).time_share_to_beat == 1


@pytest.mark.parametrize("of_cache", [33.5, 36, 45])
def test_what_the_step_cache_costs_is_part_of_every_run(of_cache):
    """The target is met where both errors together meet it, and few runs find that place."""
    target, believed = Target(33), replace(sensitivity(), cached_time_share=0.6)
    asked: list[Candidate] = []

    def evaluate(candidate):
        asked.append(candidate)
        lost = 10 ** (-World(target).outcome(candidate).psnr / 10) + 10 ** (-of_cache / 10)
        psnr = -10 * math.log10(lost)
        return Outcome(psnr, None, believed.time_share(candidate), target.met_by(psnr, None))

    search = Search(believed, target, evaluate, budget=12, psnr_of_cache=of_cache)
    found = search.run()
    assert search.outcomes[found].meets
    every = [(believed.time_share(one), one) for one in believed.candidates()]
    best = min(time_share for time_share, one in every if evaluate(one).meets)
    assert believed.time_share(found) <= best + 0.015


def test_nothing_to_tune():
    dense = {0.5: [CellReading("t", 0, 0, 0.0, 0.0, 1.0, 1.0, 1.0)]}
    with pytest.raises(ConfigError, match="nothing ran sparse"):
        Sensitivity.from_readings(dense, 0.5)
