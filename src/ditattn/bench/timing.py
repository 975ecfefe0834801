"""Timing several calls in one process, in turns, and describing the machine it was done on."""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ditattn._version import __version__
from ditattn.ops import cpu_library

__all__ = ["Timing", "interleaved", "machine", "ratio"]


@dataclass(frozen=True)
class Timing:
    """Wall times of one call in milliseconds: every round, in order."""

    name: str
    rounds_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.rounds_ms)

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "median_ms": self.median_ms}


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, shortest_s: float = 0.05) -> dict[str, Timing]:
    """Each call once per round, after one round that does not count. A fast call is repeated for `shortest_s` and its best run kept."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            spent = best = _seconds(call)
            while spent < shortest_s:
                again = _seconds(call)
                spent, best = spent + again, min(best, again)
            if number:
                times[name].append(1000 * best)
    return {name: Timing(name, tuple(values)) for name, values in times.items()}


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


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cpu_name() -> str:
    """Model name and the instruction sets that matter here, where the system tells them."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if ":" in line)
    except OSError:
        return platform.processor() or platform.machine()
    known = {name.strip(): value.strip() for name, value in fields.items()}
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
