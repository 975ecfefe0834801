"""What long work says while it goes on. Nothing here draws: the command line does (`cli/progress.py`)."""

from __future__ import annotations

__all__ = ["SILENT", "Progress"]


class Progress:
    """Hears how far the work is. This one keeps it to itself; subclasses show it."""

    def expect(self, num_runs: int) -> None:
        """So many runs lie ahead."""

    def begin(self, line: str, *, counts: bool = True) -> None:
        """What begins, in one line. `counts`: it is one of the runs that are expected, and `advance` follows when it has ended."""

    def step(self, done: int, total: int | None) -> None:
        """So many of the steps of what has begun are done; None if nobody knows how many there are."""

    def advance(self) -> None:
        """A run has ended."""

    def note(self, line: str) -> None:
        """A result that has to stay in sight."""


SILENT = Progress()
