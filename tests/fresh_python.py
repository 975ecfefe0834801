"""Pythons of their own for Triton, whose interpreter has to be chosen before it is imported: forked from one that has made the choice."""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path

# what takes longest to import
PRELOAD = ("torch._dynamo", "triton", "pytest")
# it only ends a hang
PATIENCE_S = 900


def child(arguments: list[str], interpreted: bool) -> subprocess.CompletedProcess[str]:
    """`python arguments`, a script or `-m module`, with TRITON_INTERPRET=1 or without. Torch and Triton are imported already."""
    server = _server(interpreted)
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("stdout", "stderr")]
        print(json.dumps([arguments, *map(str, said)]), file=server.stdin, flush=True)
        status = server.stdout.readline()
        assert status, f"the process that forks others ended with status {server.wait()}"
        return subprocess.CompletedProcess(arguments, int(status), *(path.read_text(encoding="utf-8") for path in said))


def environment(interpreted: bool) -> dict[str, str]:
    """Of a process whose Triton interprets or compiles."""
    # where the tests run on a source tree that is not installed, so does the child
    path = os.pathsep.join([str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
    own = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    own.pop("TRITON_INTERPRET", None)
    return {**own, "TRITON_INTERPRET": "1"} if interpreted else own


@cache
def _server(interpreted: bool) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__], env=environment(interpreted), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)
    return server


def _serve() -> None:
    """For every line of stdin, a process; its exit status is a line of stdout."""
    for name in PRELOAD:
        importlib.import_module(name)
    if "TRITON_INTERPRET" in os.environ:
        importlib.import_module("triton_preparation").prepare_once_per_kernel()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _become(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _become(arguments: list[str], stdout: str, stderr: str) -> None:
    """Does not return."""
    signal.alarm(PATIENCE_S)
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, stdout, os.O_WRONLY | os.O_CREAT), (2, stderr, os.O_WRONLY | os.O_CREAT)):
        os.dup2(os.open(path, flags), number)
    status: object = 1
    try:
        of_module = arguments[0] == "-m"
        sys.argv = arguments[1:] if of_module else arguments
        (runpy.run_module if of_module else runpy.run_path)(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    _serve()
