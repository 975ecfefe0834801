"""How every verb shows that it works: one bar on a terminal, and elsewhere a line for everything that begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from ditattn.cli.terminal import say
from ditattn.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = ["ShownProgress", "progress_bar"]

# what the time left is estimated from: all of the work, since one run may take minutes
SPEED_PERIOD_S = 24 * 3600.0


class ShownProgress(Progress):
    """Progress as lines on stderr, for logs: steps are left out."""

    def begin(self, line: str, *, counts: bool = True) -> None:
        say(line)

    def note(self, line: str) -> None:
        say(line)

    def print(self, text: str, *, err: bool = False) -> None:
        """A text on stdout (`err`: on stderr), with no bar in its way."""
        typer.echo(text, err=err)


class _Bar(ShownProgress):
    """Progress as a bar under everything else that is printed."""

    def __init__(self, drawn: RichProgress) -> None:
        self._drawn = drawn
        self._task = drawn.add_task("", total=None, count="")
        self._expected, self._ended, self._shown, self._counts = 0, 0, 0.0, False

    def expect(self, num_runs: int) -> None:
        self._expected = num_runs

    def begin(self, line: str, *, counts: bool = True) -> None:
        self._counts = counts
        self._drawn.update(self._task, description=line)
        self._show("")

    def step(self, done: int, total: int | None) -> None:
        self._show(f"step {done}" + (f" of {total}" if total else ""), done / total if total and self._counts else 0.0)

    def advance(self) -> None:
        self._ended += 1
        self._show("")

    def note(self, line: str) -> None:
        self._drawn.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def print(self, text: str, *, err: bool = False) -> None:
        self._drawn.stop()
        typer.echo(text, err=err)
        self._drawn.start()

    def _show(self, step: str, of_run: float = 0.0) -> None:
        """Until something is done the bar only shows that there is work; it never goes back."""
        run = f"run {min(self._ended + 1, self._expected)} of {self._expected}" if self._counts and self._expected > 1 else ""
        self._shown = max(self._shown, min(self._ended + of_run, self._expected))
        total, completed = (self._expected, self._shown) if self._shown else (None, None)
        self._drawn.update(self._task, total=total, completed=completed, count=", ".join(filter(None, (run, step))))


@contextmanager
def progress_bar() -> Iterator[ShownProgress]:
    """What is shown while the block runs: a bar with the time left if stderr is a terminal, which leaves no trace; otherwise lines."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield ShownProgress()
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # stdout may be a pipe, and is not to end up on stderr
    shown = RichProgress(
        *columns, console=console, transient=True, redirect_stdout=False, speed_estimate_period=SPEED_PERIOD_S, expand=True
    )
    with shown as drawn:
        yield _Bar(drawn)
