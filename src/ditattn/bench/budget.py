"""Fitting the calls of a table into its time: what is too slow at its full size is measured once, at a smaller one.

How slow a call is, is found out at its smallest size, and then at larger ones, each affordable by what the one before took.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ditattn.bench.timing import Effort, Timing, interleaved, ratio, seconds

__all__ = ["Call", "Row", "compared", "halvings", "measure", "next_size", "settle"]

# a call at its full size runs in a warm-up round and at least one more
LEAST_RUNS = 2
# rates fall where matrices leave the caches: an estimate from a much smaller size may be that far off
MARGIN = 4.0


@dataclass(frozen=True)
class Call:
    """What a row of a table measures, at whatever size the time allows.

    Attributes:
        name: of the row at its full size.
        sizes: ascending; the last one is the full size. A single one is run without asking what it costs.
        make: the call at a size.
        work: floating-point operations at a size; None where they are not counted, which needs a single size.
        label: a size, for people.
        expected: what the call must return at a size, up to rounding; None where nobody compares.
        largest: the largest size that it may run at, and why; None where it may run at all.
    """

    name: str
    sizes: tuple[int, ...]
    make: Callable[[int], Callable[[], Any]]
    work: Callable[[int], float] | None = None
    label: Callable[[int], str] = "S {}".format
    expected: Callable[[int], Any] | None = None
    largest: tuple[int, str] | None = None

    def grown(self, seconds_at: float, size: int, larger: int) -> float:
        """Seconds at the larger size if the rate stays what it was at `size`."""
        if larger == size:
            return seconds_at
        assert self.work is not None, f"{self.name} has several sizes and no work"
        return seconds_at * self.work(larger) / self.work(size)


@dataclass(frozen=True)
class Row:
    """A call, the size that it ran at, its times there, and why the size is not the full one."""

    call: Call
    size: int
    timing: Timing
    reason: str = ""

    @property
    def is_full(self) -> bool:
        return self.size == self.call.sizes[-1]

    @property
    def full_ms(self) -> float:
        """Median at the full size; where a smaller one ran, what its rate makes of the full size."""
        return self.call.grown(self.timing.median_ms, self.size, self.call.sizes[-1])

    @property
    def gflops(self) -> float | None:
        return None if self.call.work is None else self.call.work(self.size) / self.timing.median_ms / 1e6


def measure(calls: Sequence[Call], effort: Effort, until_s: float) -> dict[str, Row]:
    """Every call, by its name: those that can run at their full size in turns, until `until_s` on the clock, the others once."""
    settled = {call.name: settle(call, effort.budget_s / len(calls), effort) for call in calls}
    runs = {call.name: call.make(call.sizes[-1]) for call in calls if settled[call.name] is None}
    times = interleaved(runs, effort, until_s) if runs else {}
    return {call.name: settled[call.name] or Row(call, call.sizes[-1], times[call.name]) for call in calls}


def settle(call: Call, share_s: float, effort: Effort) -> Row | None:
    """None if the full size can run in `share_s` seconds; otherwise what the largest size took that can."""
    size, full = call.sizes[0], call.sizes[-1]
    while size != full:
        effort.progress(f"how long {call.name} takes, at {call.label(size)}")
        run = call.make(size)
        if size == call.sizes[0]:
            # what is loaded and set up at first may take a thousand times as long as the call
            run()
        run_s = seconds(run, effort.clock)
        following = next_size(call, size, run_s, share_s)
        if following is not None and call.largest is not None and following > call.largest[0]:
            following = max((allowed for allowed in call.sizes if allowed <= call.largest[0]), default=size)
            if following <= size:
                return Row(call, size, Timing(f"{call.name}, at {call.label(size)}", (1000 * run_s,)), call.largest[1])
        if following is None:
            reason = (
                f"by its rate at {call.label(size)} it would take {_in_words(call.grown(run_s, size, full))} at "
                f"{call.label(full)}, and {LEAST_RUNS} runs have to fit into {_in_words(share_s)}, its share of the budget"
            )
            return Row(call, size, Timing(f"{call.name}, at {call.label(size)}", (1000 * run_s,)), reason)
        size = following
    return None


def _in_words(time_s: float) -> str:
    return f"{time_s:.2g} s" if time_s < 10 else f"{time_s:.0f} s"


def next_size(call: Call, size: int, run_s: float, share_s: float) -> int | None:
    """The size to run after one run at `size` took `run_s` seconds; None if the next larger one would not end in its share.

    The full size comes at once where there is time for it by a wide margin, otherwise one size after the other.
    """
    full, following = call.sizes[-1], call.sizes[call.sizes.index(size) + 1]
    if MARGIN * LEAST_RUNS * call.grown(run_s, size, full) <= share_s:
        return full
    return following if LEAST_RUNS * call.grown(run_s, size, following) <= share_s else None


def halvings(full: int, least: int) -> tuple[int, ...]:
    """`full` and its halves down to `least`, ascending. Only `full` where it is not larger than `least`."""
    sizes = [full]
    while sizes[0] // 2 >= least:
        sizes.insert(0, sizes[0] // 2)
    return tuple(sizes)


def compared(slow: Row, fast: Row) -> tuple[float, float, float]:
    """Median, smallest and largest `slow / fast` in time at the full sizes.

    Within rounds; one number, by the rates, where one of them ran at a smaller size.
    """
    if slow.is_full and fast.is_full:
        return ratio(slow.timing, fast.timing)
    by_rates = slow.full_ms / fast.full_ms
    return by_rates, by_rates, by_rates
