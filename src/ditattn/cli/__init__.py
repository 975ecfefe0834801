"""The command line: one file per verb. Nothing heavy is imported until a verb needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """The console entry point; ends the process with the command's exit status."""
    # OpenMP threads that spin while they wait make torch several times slower wherever other programs want the cores too;
    # it is read when torch loads
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from ditattn.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.stderr.write(f"ditattn: error: package '{error.name}' is missing (the command line): pip install ditattn\n")
        sys.exit(1)
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))
