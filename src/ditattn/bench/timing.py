"""Timing several calls in one process, in turns, and describing the machine it was done on."""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ditattn._version import __version__
from ditattn.devices import find_device
from ditattn.devices.cpu import cpuinfo
from ditattn.ops import cpu_library

__all__ = ["Effort", "Timing", "interleaved", "machine", "ratio", "seconds"]

# a faster call is repeated for as long, and its best run kept
SHORTEST_S = 0.05


@dataclass(frozen=True)
class Effort:
    """How often the calls of a table are measured, and how long that may take.

    Attributes:
        rounds: times that every call is measured, if the time is enough.
        budget_s: seconds that one table may take.
        progress: told what begins, in one line.
        clock: seconds from any beginning.
    """

    rounds: int = 7
    budget_s: float = 90.0
    progress: Callable[[str], None] = lambda _: None
    clock: Callable[[], float] = time.perf_counter

    def until_s(self) -> float:
        """When a table that begins now has to end, on the clock."""
        return self.clock() + self.budget_s

    def about(self, subject: str) -> Effort:
        """The same, with the subject before every line of progress."""
        return replace(self, progress=lambda line: self.progress(f"{subject}: {line}"))


@dataclass(frozen=True)
class Timing:
    """Wall times of one call in milliseconds: every round, in order; and whether a round that does not count came before them."""

    name: str
    rounds_ms: tuple[float, ...]
    warmed_up: bool = True

    @property
    def median_ms(self) -> float:
        return statistics.median(self.rounds_ms)


def interleaved(calls: dict[str, Callable[[], object]], effort: Effort, until_s: float) -> dict[str, Timing]:
    """Each call once per round, after one round that does not count.

    No round begins that would end after `until_s` on the clock of `effort` if it took as long as the one before. If that leaves no
    round but the first, it counts.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(effort.rounds + 1):
        effort.progress(f"round {number} of {effort.rounds}" if number else "warm-up round")
        start_s = effort.clock()
        for name, call in calls.items():
            times[name].append(1000 * seconds(call, effort.clock))
        end_s = effort.clock()
        if end_s + (end_s - start_s) > until_s:
            break
    return {name: Timing(name, tuple(values[1:] or values), len(values) > 1) for name, values in times.items()}


def seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Wall time of one run; the shortest of several where one takes less than `SHORTEST_S`."""
    begin_s = start_s = clock()
    best = float("inf")
    while True:
        call()
        end_s = clock()
        best = min(best, end_s - start_s)
        if end_s - begin_s >= SHORTEST_S:
            return best
        start_s = end_s


def ratio(slow: Timing, fast: Timing) -> tuple[float, float, float]:
    """Median, smallest and largest of the per-round ratios `slow / fast`: what the machine did in between cancels out."""
    ratios = [a / b for a, b in zip(slow.rounds_ms, fast.rounds_ms, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def machine() -> dict[str, object]:
    """What a reader needs to compare numbers: CPU, threads, versions, commit, and the kernels in use."""
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "kernels": cpu_library.selection().sentence(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ditattn": __version__,
        "commit": _commit(),
    }


def _cpu_name() -> str:
    """Model name and the instruction sets that matter here, where the system tells them."""
    known = cpuinfo()
    if not known:
        return find_device("cpu").device_name()
    wanted = {"avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16"}
    flags = [flag for flag in known.get("flags", "").split() if flag in wanted]
    return (
        f"{known.get('model name', platform.machine())}, family {known.get('cpu family')} model {known.get('model')} ({', '.join(flags)})"
    )


def _commit() -> str | None:
    """Short commit of the source tree this package runs from; None for an installed wheel, and where there is no git."""
    here = Path(__file__)
    # an environment may lie inside the repository of another project, whose commit would say nothing
    if shutil.which("git") is None or _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _git(here.parent, "rev-parse", "--short", "HEAD")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git printed; None if it failed or printed nothing."""
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None
