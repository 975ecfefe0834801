"""What fits into the time of a table: too slow calls run once at a smaller size. The clock is a fake that only the calls move."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ditattn.bench import budget, timing
from ditattn.bench.budget import Call, Row, compared, halvings, measure, next_size, settle
from ditattn.bench.timing import Effort, Timing, interleaved


class Machine:
    """A clock, and calls that move it: what a call runs at is noted."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.ran: list[tuple[str, int]] = []
        self.lines: list[str] = []

    def effort(self, rounds: int, budget_s: float) -> Effort:
        return Effort(rounds, budget_s, self.lines.append, lambda: self.now_s)

    def call(self, name: str, sizes: tuple[int, ...], rate: float, fades_at: int = 10**9) -> Call:
        """Work n^3 at `rate` a second; at a quarter of it from the size `fades_at` on."""

        def make(size: int) -> Callable[[], None]:
            def run() -> None:
                self.ran.append((name, size))
                self.now_s += size**3 / (rate / 4 if size >= fades_at else rate)

            return run

        return Call(name, sizes, make, lambda n: float(n**3), "n {}".format)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(timing, "SHORTEST_S", 0)
    return Machine()


def test_halvings() -> None:
    assert halvings(2048, 256) == (256, 512, 1024, 2048)
    assert halvings(32760, 4096) == (4095 * 2, 16380, 32760)
    assert halvings(128, 256) == (128,)
    assert halvings(21, 1) == (1, 2, 5, 10, 21)


@pytest.mark.parametrize(
    ("run_s", "found"),
    [
        # two runs of the full size, a thousand times the work, end in 8 s by a margin of 4
        (0.001, 10),
        (0.0011, 2),
        # two runs of the next size, eight times the work
        (0.5, 2),
        (0.51, None),
    ],
)
def test_the_next_size_is_affordable(run_s: float, found: int | None) -> None:
    call = Call("cube", (1, 2, 10), lambda _: lambda: None, lambda n: float(n**3))
    assert next_size(call, 1, run_s, 8.0) == found


def test_a_slow_call_runs_once_at_the_largest_size_that_its_share_holds_and_says_so(machine: Machine) -> None:
    slow = machine.call("product", (256, 512, 1024, 2048), rate=1e9)
    rows = measure([slow, machine.call("own", (256, 2048), rate=1e12)], machine.effort(2, 8.0), 8.0)
    # 2 s at 1024, twice, are the share of 4 s; 17 s at 2048 are not. The first run is never timed
    assert [size for name, size in machine.ran if name == "product"] == [256, 256, 512, 1024]
    row = rows["product"]
    assert (row.is_full, row.size, row.timing.name) == (False, 1024, "product, at n 1024")
    assert row.timing.rounds_ms == (pytest.approx(1024**3 / 1e6),)
    assert row.gflops == pytest.approx(1.0)
    assert row.full_ms == pytest.approx(2048**3 / 1e6)
    assert row.reason == ("by its rate at n 1024 it would take 8.6 s at n 2048, and 2 runs have to fit into 4 s, its share of the budget")
    own = rows["own"]
    assert (own.is_full, own.timing.name, own.reason, len(own.timing.rounds_ms)) == (True, "own", "", 2)
    assert machine.now_s < 8


def test_fast_calls_are_measured_at_full_size_after_one_look(machine: Machine) -> None:
    assert settle(machine.call("fast", (256, 512, 1024, 2048), rate=1e12), 1.0, machine.effort(7, 9.0)) is None
    assert machine.ran == [("fast", 256)] * 2


def test_a_rate_that_fades_with_size_is_noticed_on_the_way(machine: Machine) -> None:
    """As bf16 products do that are not blocked: by the rate at 256 the full size would fit."""
    row = settle(machine.call("fading", (256, 512, 1024, 2048), rate=4e9, fades_at=1024), 5.0, machine.effort(7, 45.0))
    assert row is not None
    assert row.size == 1024
    assert row.gflops == pytest.approx(1.0)


def test_setting_up_is_not_taken_for_the_call(machine: Machine) -> None:
    once = [True]

    def make(size: int) -> Callable[[], None]:
        def run() -> None:
            machine.now_s += 60.0 if once else 0.001
            once.clear()

        return run

    assert settle(Call("cold", (1, 2), make, float), 1.0, machine.effort(7, 9.0)) is None


def test_the_budget_ends_the_rounds(machine: Machine) -> None:
    effort = machine.effort(7, 35.0)
    times = interleaved({"x": machine.call("x", (10,), rate=100.0).make(10)}, effort, effort.until_s())
    # 10 s each: one that does not count and two more; a fourth would end at 40 s
    assert times["x"] == Timing("x", (10000.0, 10000.0))
    assert machine.now_s == 30.0
    assert machine.lines == ["warm-up round", "round 1 of 7", "round 2 of 7"]


def test_if_there_is_time_for_one_round_only_it_counts(machine: Machine) -> None:
    effort = machine.effort(7, 15.0)
    times = interleaved({"x": machine.call("x", (10,), rate=100.0).make(10)}, effort, effort.until_s())
    assert times["x"] == Timing("x", (10000.0,), warmed_up=False)
    assert machine.now_s == 10.0


def test_time_used_before_the_rounds_is_missing_in_them(machine: Machine) -> None:
    call = machine.call("x", (10,), rate=100.0)
    machine.now_s = 20.0
    assert len(measure([call], machine.effort(7, 35.0), until_s=45.0)["x"].timing.rounds_ms) == 1


@pytest.mark.parametrize("rate", [1e3, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("budget_s", [20.0, 90.0])
def test_no_table_takes_longer_than_its_budget(machine: Machine, rate: float, budget_s: float) -> None:
    """Rates that do not change with size; a machine that cannot run the smallest size in its share is beyond help."""
    calls = [machine.call(f"{factor}", (2, 4, 8, 256, 512, 1024, 2048), rate * factor) for factor in (1, 3, 30)]
    rows = measure(calls, machine.effort(7, budget_s), budget_s)
    assert machine.now_s <= budget_s
    assert all(row.is_full or len(row.timing.rounds_ms) == 1 for row in rows.values())


def test_progress_tells_the_subject_the_call_and_the_round(machine: Machine) -> None:
    effort = machine.effort(1, 8.0).about("table 1 of 2").about("S 5")
    measure([machine.call("product", (256, 2048), rate=1e12)], effort, 8.0)
    assert machine.lines == [f"table 1 of 2: S 5: {what}" for what in ("how long product takes, at n 256", "warm-up round", "round 1 of 1")]


def test_ratios_come_from_rounds_at_equal_sizes_and_from_rates_otherwise() -> None:
    call = Call("x", (10, 20), lambda _: lambda: None, lambda n: float(n**2))
    fast = Row(call, 20, Timing("fast", (1.0, 2.0, 4.0)))
    assert compared(Row(call, 20, Timing("slow", (2.0, 2.0, 12.0))), fast) == (2.0, 1.0, 3.0)
    # a quarter of the work took 2 ms: 8 ms at the full size
    assert compared(Row(call, 10, Timing("slow", (2.0,))), fast) == (4.0, 4.0, 4.0)


def test_uncounted_work_has_no_rate() -> None:
    assert Row(Call("x", (5,), lambda _: lambda: None), 5, Timing("x", (1.0,))).gflops is None


def test_two_runs_are_the_least() -> None:
    """What the tests above count with."""
    assert (budget.LEAST_RUNS, budget.MARGIN) == (2, 4.0)
