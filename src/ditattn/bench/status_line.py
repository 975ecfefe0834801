"""What a long command is doing: one line that is written over on a terminal, a line each elsewhere."""

from __future__ import annotations

import shutil
import sys

__all__ = ["show"]


def show(line: str) -> None:
    """Show the line on stderr; an empty one wipes what is there on a terminal, so that something else can be printed."""
    if sys.stderr.isatty():
        # a line that wraps could not be written over
        text = f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}"
    else:
        text = line and f"{line}\n"
    sys.stderr.write(text)
    sys.stderr.flush()
