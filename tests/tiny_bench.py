"""The command with a benchmark of tiny sizes, for a process of its own."""

from __future__ import annotations

from ditattn.bench import suite, timing
from ditattn.cli import main as command


def main(arguments: list[str]) -> None:
    """Ends the process with the command's exit status."""
    timing.SHORTEST_S = 0
    suite.FULL = suite.Sizes(256, (256, 512), None, matmul=128)
    command(arguments)
