"""Builds of the CPU kernels' sources for tests: other flags than an install's, and the AMX kernels with emulated tiles."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

from ditattn.ops import cpu_library

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "src/ditattn/csrc/cpu"
EMULATION = ROOT / "tests/ops"
COMMON = ["-std=c++17", "-pthread", "-Wno-psabi", f"-I{EMULATION}"]
EMULATED = "amx, emulated tiles"
FLAGS = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512bf16": ["-march=x86-64-v4", "-mavx512bf16"],
    "amx": ["-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    # without -mamx: what comes out has no instruction of AMX
    EMULATED: ["-march=x86-64-v4", "-mavx512bf16", "-DDITATTN_EMULATED_TILES"],
}
LIBRARY = ["-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-fvisibility=hidden", *FLAGS[EMULATED]]


def build(target: Path, compiler: str, source: Path, *flags: str, csrc: Path = CSRC) -> Path:
    """Compile one source into a program or, by the flags, a shared object."""
    command = [compiler, *COMMON, *flags, f"-I{csrc}", str(source), "-o", str(target)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    return target


def runs_here(variant: str) -> bool:
    """Whether this CPU has the instructions. Where nothing can be asked: true of the package's variants, false of emulated tiles."""
    needed = "avx512bf16" if variant == EMULATED else variant
    if cpu_library.problem() is not None:
        return variant != EMULATED
    return bool(cpu_library._runnable() >> cpu_library.VARIANTS.index(needed) & 1)


def load_emulated_tiles() -> None:
    """In this process the kernels are those for AMX, with emulated tiles, as if the CPU had it. To be called before a kernel is asked for.

    The object lies beside pytest's cache and is built anew when a source changes.

    Raises:
        RuntimeError: something keeps the kernels from being loaded, such as another variant in DITATTN_CPU_ISA.
    """
    cpu_library.FOLDER = _emulated_library().parent
    cpu_library._runnable = lambda: (1 << len(cpu_library.VARIANTS)) - 1
    cpu_library.selection.cache_clear()
    chosen = cpu_library.selection()
    if chosen.sentence() != "amx":
        raise RuntimeError(f"the kernels with emulated tiles were not loaded: {chosen.sentence()}")


def _emulated_library() -> Path:
    sources = [*sorted(CSRC.iterdir()), EMULATION / "emulated_tiles.h"]
    state = hashlib.sha256("\n".join([*LIBRARY, *(path.read_text(encoding="utf-8") for path in sources)]).encode()).hexdigest()
    target = ROOT / ".pytest_cache/emulated_tiles" / state[:16] / "libditattn_cpu_amx.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        # processes that build at once each move a whole object into place
        build(target.with_suffix(f".{os.getpid()}"), "g++", CSRC / "library.cpp", *LIBRARY).replace(target)
    return target
