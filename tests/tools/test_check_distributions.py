"""`tools/check_distributions.py` lets good files pass and names what is wrong with others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

TOOL = Path(__file__).parents[2] / "tools/check_distributions.py"
NATIVE = "ditattn/ops/native"


def make(
    folder: Path, platform: str = "manylinux_2_28_x86_64", version: str = "0.1.0", failed: dict | None = None, objects: int = 2
) -> None:
    (folder / "ditattn-0.1.0.tar.gz").touch()
    built = ["baseline", "avx2"]
    with ZipFile(folder / f"ditattn-{version}-py3-none-{platform}.whl", "w") as wheel:
        wheel.writestr(f"{NATIVE}/build.json", json.dumps({"compiler": "g++", "built": built, "failed": failed or {}}))
        for variant in built[:objects]:
            wheel.writestr(f"{NATIVE}/libditattn_cpu_{variant}.so", "")


def check(folder: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, str(TOOL), str(folder), *arguments], capture_output=True, text=True, timeout=120)
    assert not done.stderr
    return done.returncode, done.stdout


def test_good_files_pass(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path, platform="manylinux_2_27_aarch64.manylinux_2_28_aarch64")
    assert check(tmp_path, "--tag", "v0.1.0") == (0, f"{tmp_path}: ready to upload\n")


@pytest.mark.parametrize(
    ("made", "arguments", "text"),
    [
        ({"platform": "linux_x86_64"}, (), "the platform tag is linux_x86_64, wanted manylinux_*"),
        ({"platform": "manylinux_2_28_x86_64.linux_x86_64"}, (), "the platform tag is manylinux_2_28_x86_64.linux_x86_64"),
        ({"failed": {"amx": "unknown option"}}, (), "the amx kernels were not built: unknown option"),
        ({"objects": 1}, (), "the avx2 kernels were built, but their object is missing"),
        ({"version": "0.2.0"}, (), "version 0.2.0, wanted 0.1.0"),
        ({}, ("--tag", "v0.2.0"), "ditattn-0.1.0.tar.gz: version 0.1.0, wanted 0.2.0"),
    ],
)
def test_what_is_wrong_is_named(made: dict, arguments: tuple[str, ...], text: str, tmp_path: Path) -> None:
    make(tmp_path, **made)
    status, out = check(tmp_path, *arguments)
    assert status == 1
    assert text in out


def test_an_empty_folder_is_not_ready(tmp_path: Path) -> None:
    assert check(tmp_path) == (1, f"{tmp_path}: found 0 sdists and 0 wheels, wanted one sdist and at least one wheel: make wheel\n")
