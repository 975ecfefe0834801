"""What a person reads while a verb works and when it ends: messages, times, tables, and failures in one line."""

from __future__ import annotations

import logging
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from ditattn.errors import DitattnError

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = [
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_USAGE",
    "Timed",
    "print_rich",
    "report_failure",
    "say",
    "set_up_messages",
    "timed",
]

EXIT_FAILED = 1
# what the user gave cannot be honoured
EXIT_USAGE = 2
# what shells report for SIGINT
EXIT_INTERRUPTED = 130

# torch's CPU allocator and some device back ends raise a bare RuntimeError
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass
class Timed:
    """A stretch of work. The duration is there when it has ended."""

    duration_ms: float = 0.0


@contextmanager
def timed(name: str) -> Iterator[Timed]:
    """Time the block; when it has succeeded, say so in one line."""
    running, start_s = Timed(), time.perf_counter()
    yield running
    running.duration_ms = (time.perf_counter() - start_s) * 1e3
    typer.echo(f"{name}: {running.duration_ms / 1e3:.1f} s", err=True)


class _OnStderr(logging.Handler):
    """Looks stderr up when it writes, since it may be redirected meanwhile."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(f"{record.levelname.lower()}: {record.getMessage()}", err=True)


def set_up_messages(debug: bool) -> None:
    """Our warnings in one line each; with `debug` everything we log, and other packages' deprecation warnings too."""
    logger = logging.getLogger("ditattn")
    if not any(isinstance(handler, _OnStderr) for handler in logger.handlers):
        logger.addHandler(_OnStderr())
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    if not debug:
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)


def say(line: str) -> None:
    """A line on stderr: what happens now."""
    typer.echo(line, err=True)


def print_rich(*parts: RenderableType) -> None:
    """Tables and coloured texts on stdout."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        # a pipe has no width: one row, one line
        console = Console(width=2000)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    typer.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def report_failure(error: BaseException, *, debug: bool, instead: str | None = "") -> int:
    """Print the line (with `debug` the traceback first) and return the exit status.

    `instead` is said in place of the error's own words; None says nothing, since another process does.
    """
    if debug:
        traceback.print_exception(error)
    status, line = describe(error)
    line = "" if instead is None else instead or line
    if line:
        typer.echo(f"ditattn: {line}", err=True)
    return status


def describe(error: BaseException) -> tuple[int, str]:
    """(exit status, the one line). The line is empty where the help text was printed already."""
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return EXIT_INTERRUPTED, "interrupted; nothing half-written is left"
    if type(error).__name__ == "NoArgsIsHelpError":
        return EXIT_USAGE, ""
    if hasattr(error, "format_message"):
        # the command line's own parser: unknown options, wrong types
        return EXIT_USAGE, f"error: {_one_line(error.format_message())}"
    if _is_out_of_memory(error):
        return EXIT_FAILED, "error: out of memory: try a smaller --height, --width or --num-frames, or --dtype bfloat16"
    if isinstance(error, DitattnError):
        return (EXIT_USAGE if isinstance(error, ValueError) else EXIT_FAILED), f"error: {_one_line(str(error))}"
    if isinstance(error, OSError):
        return EXIT_FAILED, f"error: {_one_line(str(error))}"
    return EXIT_FAILED, f"error: {type(error).__name__}: {_one_line(str(error))} (--debug shows where)"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, getattr(torch, "OutOfMemoryError", ())):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)
