"""How a failure reaches the user: one line on stderr and an exit status, no traceback unless --debug asks for it."""

from __future__ import annotations

import sys
import traceback

import typer

from ditattn.errors import DitattnError

__all__ = ["EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_USAGE", "report_failure"]

EXIT_FAILED = 1
# what the user gave cannot be honoured
EXIT_USAGE = 2
# what shells report for SIGINT
EXIT_INTERRUPTED = 130

# torch's CPU allocator and some device back ends raise a bare RuntimeError
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def report_failure(error: BaseException, *, debug: bool) -> int:
    """Print the line (with `debug` the traceback first) and return the exit status."""
    if debug:
        traceback.print_exception(error)
    status, line = describe(error)
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
