"""The CPU kernels' sources in a program of their own: under sanitizers, with other compilers, for Arm."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ditattn.ops import cpu_library

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "src/ditattn/csrc/cpu"
FLAGS = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512bf16": ["-march=x86-64-v4", "-mavx512bf16"],
    "amx": ["-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}


def _build(target: Path, compiler: str, *flags: str) -> Path:
    """The stand-alone program of sanitize_cpu.cpp."""
    command = [
        compiler,
        "-std=c++17",
        "-pthread",
        "-Wno-psabi",
        *flags,
        f"-I{CSRC}",
        str(ROOT / "tests/ops/sanitize_cpu.cpp"),
        "-o",
        str(target),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    return target


def _runs_here(variant: str) -> bool:
    return cpu_library.problem() is not None or bool(cpu_library._runnable() >> cpu_library.VARIANTS.index(variant) & 1)


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
@pytest.mark.parametrize("variant", cpu_library.VARIANTS)
def test_sanitizers(variant: str, sanitizer: str, tmp_path: Path) -> None:
    """Exact-size buffers, dense and sparse: no access outside at any tail, no data race between threads."""
    if not _runs_here(variant):
        pytest.skip(f"this CPU cannot run {variant}")
    target = _build(tmp_path / "sanitize", "g++", "-O1", "-g1", f"-fsanitize={sanitizer}", *FLAGS[variant])
    done = subprocess.run([str(target)], capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-500:]


@pytest.mark.long
@pytest.mark.parametrize(
    ("compiler", "variant", "emulator"),
    [
        ("g++", "baseline", None),
        ("clang++", "baseline", None),
        ("clang++", "amx", None),
        ("aarch64-linux-gnu-g++", "arm", "qemu-aarch64-static"),
    ],
)
def test_other_compilers_and_arm(compiler: str, variant: str, emulator: str | None, tmp_path: Path) -> None:
    """The same program against sums in double, as far as the compilers (and for Arm an emulator) are installed."""
    missing = [tool for tool in (compiler, emulator) if tool is not None and shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if emulator is None and not _runs_here(variant):
        pytest.skip(f"this CPU cannot run {variant}")
    target = _build(tmp_path / "compare", compiler, "-O2", "-static", *FLAGS.get(variant, []))
    done = subprocess.run([*([emulator] if emulator else []), str(target), "compare"], capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    assert int(done.stdout.split()[2]) > 1000
