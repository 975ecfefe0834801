"""What a run says on stderr while it works."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import typer

__all__ = ["Stage", "set_up_messages", "stage"]


@dataclass
class Stage:
    """A stretch of work. The duration is there when it has ended."""

    duration_ms: float = 0.0


@contextmanager
def stage(name: str) -> Iterator[Stage]:
    """Time the block; when it has succeeded, say so in one line."""
    running, start_s = Stage(), time.perf_counter()
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
