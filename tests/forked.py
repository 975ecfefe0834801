"""Processes without what starting them costs: forked from one that has imported diffusers."""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from garbage import collect_seldom

TESTS = Path(__file__).parent
PRELOAD = ("ditattn.cli.app", "tiny_pipelines.everything", "split_pipelines")


def forking(preload: Sequence[str] = PRELOAD) -> ForkServerContext:
    """A context whose processes are forked from one that has imported these modules. There is one such process: the first caller's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    # it leaves out in silence what it cannot import, and Python 3.11 tells it nothing of this process' path
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        multiprocessing.forkserver.ensure_running()
    return context


def start(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    stdout: int | None = None,
    stderr: int | None = None,
    daemon: bool = True,
) -> BaseProcess:
    """`python -m MODULE ARGUMENTS`, but forked: a process in which `module.main(arguments)` runs on one thread.

    Args:
        environment: what differs from that of the tests.
        stdout, stderr: file descriptors, which the process gets copies of; those of the tests unless given.
        daemon: it ends with the tests; then it starts no processes itself.
    """
    context = forking()
    # a connection is what multiprocessing can hand over
    ends = {number: Connection(os.dup(end)) for number, end in ((1, stdout), (2, stderr)) if end is not None}
    process = context.Process(target=_run, args=(module, list(arguments), {**os.environ, **environment}, ends), daemon=daemon)
    process.start()
    for end in ends.values():
        end.close()
    return process


def _run(module: str, arguments: list[str], environment: dict[str, str], ends: dict[int, Connection]) -> None:
    import torch

    # a shell that starts the tests in the background ignores SIGINT, and children inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    collect_seldom()
    os.environ.clear()
    os.environ.update(environment)
    for number, end in ends.items():
        os.dup2(end.fileno(), number)
        end.close()
    sys.exit(importlib.import_module(module).main(arguments))
