"""A Python of its own for Triton, whose interpreter has to be chosen before it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def child(arguments: list[str], interpreted: bool, timeout_s: int = 900) -> subprocess.CompletedProcess[str]:
    """`python arguments`, with TRITON_INTERPRET=1 or without."""
    # where the tests run on a source tree that is not installed, so does the child
    path = os.pathsep.join([str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=timeout_s)
