"""Builds the CPU kernels with g++ or clang: one shared object per instruction set, loaded with ctypes. The rest is in pyproject.toml.

Without a compiler the install still succeeds: `build.json` beside the objects says why there are none, and the package shows it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = Path("ditattn/ops/native")
SOURCE = Path("src/ditattn/csrc/cpu/library.cpp")
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wno-maybe-uninitialized"]
X86 = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512bf16": ["-march=x86-64-v4", "-mavx512bf16"],
    "amx": ["-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
VARIANTS = X86 if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}


def compiler() -> list[str] | None:
    """$CXX if it is set, else the first of the usual names that is installed."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for command in wanted:
        words = command.split()
        if words and shutil.which(words[0]):
            return words
    return None


class BuildKernels(build_ext):
    """Compiles each variant on its own. One that fails is left out and its error is written down; the others serve."""

    def run(self) -> None:
        # every variant is a compiler run of its own
        self.parallel = self.parallel or os.cpu_count()
        self.report: dict[str, object] = {"compiler": None, "built": [], "failed": {}}
        self.cxx = compiler()
        if self.cxx is None:
            looked_for = os.environ.get("CXX") or "g++, clang++, c++"
            self.report["failed"] = dict.fromkeys(VARIANTS, f"no C++ compiler was found (looked for {looked_for})")
        else:
            self.report["compiler"] = subprocess.run([*self.cxx, "--version"], capture_output=True, text=True).stdout.split("\n")[0]
        in_source = self.inplace
        for root in [Path(self.build_lib), *([Path("src")] if in_source else [])]:
            # what an earlier build left and this one cannot make would be packaged or loaded as if it were of these sources
            for old in (root / FOLDER).glob("lib*.so"):
                old.unlink()
        if in_source:
            # objects are not in the repository, so a fresh clone does not have their folder
            (Path("src") / FOLDER).mkdir(parents=True, exist_ok=True)
        super().run()
        self._write_report(Path(self.build_lib))
        if in_source:
            self._write_report(Path("src"))

    def _write_report(self, root: Path) -> None:
        folder = root / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.json").write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        variant = ext.name.rsplit("_", 1)[-1]
        if self.cxx is not None:
            self._compile(variant, target)

    def _compile(self, variant: str, target: Path) -> None:
        done = subprocess.run([*self.cxx, *FLAGS, *VARIANTS[variant], str(SOURCE), "-o", str(target)], capture_output=True, text=True)
        if done.returncode == 0:
            self.report["built"].append(variant)
        else:
            self.report["failed"][variant] = done.stderr.strip()[-2000:]
            target.unlink(missing_ok=True)
            self.warn(f"the {variant} kernels were not built: {done.stderr.strip()[-500:]}")

    def get_ext_filename(self, fullname: str) -> str:
        """No Python version in the name: the objects do not use Python's ABI."""
        *package, name = fullname.split(".")
        return str(Path(*package, f"lib{name}.so"))

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


class PlatformWheel(bdist_wheel):
    """Tied to the platform, not to a Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            f"ditattn.ops.native.ditattn_cpu_{name}", [str(SOURCE)], depends=[str(p) for p in SOURCE.parent.glob("*.h")], optional=True
        )
        for name in VARIANTS
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
