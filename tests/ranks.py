"""Several processes that work together, as ranks of a gloo group on the CPU: started once, then told what to run."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from forked import PRELOAD, forking
from garbage import collect_seldom

# what a rank may take for one answer; it only ends a hang
PATIENCE_S = 1200


class Ranks:
    """`count` processes. Importing is paid once: they are forked from one that has imported what `preload` names."""

    def __init__(self, count: int, preload: Sequence[str] = PRELOAD) -> None:
        # names of the machine may lead to an interface that processes of a sandbox cannot use
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        context = forking(preload)
        self._folder = tempfile.TemporaryDirectory()
        meeting = Path(self._folder.name) / "store"
        self._ends: list[Connection] = []
        self.processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, str(meeting), theirs), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank; results by rank. A rank's exception is raised here with its traceback."""
        for end in self._ends:
            end.send((function, args))
        answers = [self._answer(rank) for rank in range(len(self._ends))]
        for rank, (failed, answer) in enumerate(answers):
            if failed:
                raise AssertionError(f"rank {rank}:\n{answer}")
        return [answer for _, answer in answers]

    def _answer(self, rank: int) -> tuple[bool, Any]:
        if not self._ends[rank].poll(PATIENCE_S):
            self.close()
            raise TimeoutError(f"rank {rank} did not answer")
        answer: tuple[bool, Any] = self._ends[rank].recv()
        return answer

    def close(self) -> None:
        """End all of them."""
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, count: int, meeting: str, end: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    collect_seldom()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=timedelta(seconds=PATIENCE_S))
    while True:
        function, args = end.recv()
        try:
            end.send((False, function(*args)))
        except Exception:  # noqa: BLE001
            end.send((True, traceback.format_exc()))


def run_command(
    arguments: Sequence[str], count: int, folder: Path, prepare: Callable[[], None] | None = None
) -> tuple[list[int | None], str, str]:
    """`torchrun --nproc-per-node COUNT -m ditattn ARGUMENTS` without what starting it costs: its processes are forked from one that has
    imported diffusers.

    Args:
        folder: takes what every rank says, in files.
        prepare: what every rank does first; of a module that it can import.

    Returns:
        Exit statuses by rank, and what all of them wrote to stdout and to stderr.
    """
    context = forking()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = [context.Process(target=_command, args=(list(arguments), rank, count, port, folder, prepare)) for rank in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(PATIENCE_S)
        process.kill()
        process.join()
    said = ("".join((folder / f"{rank}.{name}").read_text(encoding="utf-8") for rank in range(count)) for name in ("stdout", "stderr"))
    return [process.exitcode for process in ranks], *said


def _command(arguments: list[str], rank: int, count: int, port: int, folder: Path, prepare: Callable[[], None] | None) -> None:
    import torch

    from ditattn.cli.app import run

    torch.set_num_threads(1)
    collect_seldom()
    for name in ("stdout", "stderr"):
        with open(folder / f"{rank}.{name}", "wb") as file:
            os.dup2(file.fileno(), getattr(sys, name).fileno())
    values = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in values.items()}, GLOO_SOCKET_IFNAME="lo")
    if prepare is not None:
        prepare()
    sys.exit(run(arguments))
