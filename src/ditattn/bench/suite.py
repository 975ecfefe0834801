"""The questions of `ditattn bench` and `python -m benchmarks.cpu_attention`, in order, and the record of their answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ditattn.bench.cpu_attention import Measured, measure_growth, measure_shape, measure_video, render, render_machine
from ditattn.bench.timing import Effort, machine
from ditattn.errors import BackendUnavailable
from ditattn.ops import cpu_library
from ditattn.ops.block_sparse_attention.flex import why_not_compiled
from ditattn.progress import SILENT, Progress

__all__ = ["FULL", "QUICK", "Answers", "Sizes", "ask"]

SEED = 0


@dataclass(frozen=True)
class Sizes:
    """How large the problems are.

    Attributes:
        length: tokens of the dense and sparse calls.
        growth: tokens of the calls whose time is followed.
        video: token grid (F, Y, X) of the whole Rain Fusion call; None leaves it out.
        matmul: rows and columns of the matrices whose product is measured.
    """

    length: int
    growth: tuple[int, ...]
    video: tuple[int, int, int] | None
    matmul: int = 2048


# the grid of wan2.1-1.3b-480p-81f
FULL = Sizes(8192, (2048, 4096, 8192, 16384, 32768, 65536), (21, 30, 52))
QUICK = Sizes(4096, (2048, 4096, 8192, 16384), None)


@dataclass(frozen=True)
class Answers:
    """What was measured, in how many rounds at most and how many seconds per table, and what was not, with the reasons by call."""

    rounds: int
    budget_s: float
    measured: tuple[Measured, ...]
    left_out: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return {
            "machine": machine(),
            "kernels_passed_over": cpu_library.selection().rejected,
            "rounds": self.rounds,
            "budget_s": self.budget_s,
            "seed": SEED,
            "left_out": self.left_out,
            "report": [measured.as_dict() for measured in self.measured],
        }


def ask(sizes: Sizes, effort: Effort, flex: bool, tell: Callable[[str], None], progress: Progress = SILENT) -> Answers:
    """Measure everything. `tell` gets the machine and then every table as Markdown, each as soon as it is known.

    `progress` hears how many tables there are, and of each that is known; what is being measured, `effort.progress` hears.

    Raises:
        BackendUnavailable: this machine has no compiled kernel to measure; says why.
    """
    if reason := cpu_library.problem():
        raise BackendUnavailable(f"nothing was measured, there is no compiled kernel: {reason}")
    left_out = {} if flex else {"FlexAttention": "not asked for"}
    if flex and (reason := why_not_compiled()):
        left_out["FlexAttention"] = reason
    tell(render_machine())
    for name, reason in left_out.items():
        tell(f"left out: {name}: {reason}")
    torch.manual_seed(SEED)
    tables, measured = _tables(sizes, not left_out), []
    progress.expect(len(tables))
    for number, table in enumerate(tables, 1):
        measured.append(table(effort.about(f"table {number} of {len(tables)}")))
        progress.advance()
        tell(render(measured[-1]))
    return Answers(effort.rounds, effort.budget_s, tuple(measured), left_out)


def _tables(sizes: Sizes, flex: bool) -> list[Callable[[Effort], Measured]]:
    tables: list[Callable[[Effort], Measured]] = [
        partial(measure_shape, sizes.length, 4, head_dim, dtype, flex=flex and head_dim == 128, matmul=sizes.matmul)
        for dtype in (torch.bfloat16, torch.float32)
        for head_dim in (128, 64)
    ]
    tables.append(partial(measure_shape, sizes.length, 4, 128, torch.float16, matmul=sizes.matmul))
    tables.append(partial(measure_growth, sizes.growth, 1, 128, torch.bfloat16))
    if grid := sizes.video:
        # seconds per call: fewer rounds will do
        tables.append(lambda effort: measure_video(grid, 12, 128, torch.bfloat16, replace(effort, rounds=max(3, effort.rounds // 2))))
    return tables
