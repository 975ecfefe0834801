"""The sdist and the wheel of `dist/`, as users get them: installed into an environment of their own and used there.

`make test-wheel` builds both and runs this; without `DITATTN_DIST` it is skipped. The environment reads torch and diffusers from the one
that runs the tests, so that nothing large is downloaded; ditattn itself and the command come from the installed file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIST = os.environ.get("DITATTN_DIST")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(DIST is None, reason="needs built distributions: make test-wheel")]


def _distribution(pattern: str) -> Path:
    found = list(Path(str(DIST)).resolve().glob(pattern))
    assert len(found) == 1, f"{pattern} in {DIST}: {found}"
    return found[0]


@dataclass(frozen=True)
class Installed:
    """An environment, and what its processes see of this machine's settings."""

    folder: Path
    variables: Mapping[str, str]

    def run(self, program: str, *arguments: object) -> str:
        done = subprocess.run(
            [str(self.folder / "bin" / program), *map(str, arguments)],
            cwd=self.folder,
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


def _install(distribution: Path, folder: Path, **variables: str) -> Installed:
    """`pip install distribution` into a new environment. `PYTHONPATH` and `CXX` do not reach it, `variables` do."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=600)
    seen = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CXX") and not key.startswith("DITATTN_")}
    seen |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "--quiet", "--no-deps", str(distribution)]
    done = subprocess.run(command, cwd=folder, env=seen, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    packages = next(folder.glob("lib/python*/site-packages"))
    # a path and nothing more: the .pth files of that folder, such as an editable install's, are not read
    (packages / "torch_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Installed(folder, seen)


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel without any compiler on PATH; the sdist with those of this machine."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "wheel":
        return _install(_distribution("*.whl"), folder, PATH=str(folder / "bin"))
    return _install(_distribution("*.tar.gz"), folder)


def test_the_package_is_the_installed_one_with_all_its_kernels(installed: Installed) -> None:
    script = "import ditattn, ditattn.ops.cpu_library as c, json; print(json.dumps([ditattn.__file__, str(c.FOLDER), c.problem()]))"
    file, native, problem = json.loads(installed.run("python", "-c", script))
    assert Path(file).is_relative_to(installed.folder)
    assert problem is None
    report = json.loads(Path(native, "build.json").read_text())
    assert report["failed"] == {}
    assert {f"libditattn_cpu_{variant}.so" for variant in report["built"]} == {path.name for path in Path(native).glob("*.so")}


def test_backends_lists_the_kernels_as_ready(installed: Installed) -> None:
    rows = json.loads(installed.run("ditattn", "backends", "--json", "--device", "cpu"))["backends"]
    ready = {row["operation"] for row in rows if row["implementation"] == "cpu" and row["available"]}
    assert ready == {"dense_attention", "block_sparse_attention", "block_mean", "tail_estimate"}


def test_the_kernels_against_the_oracle(installed: Installed) -> None:
    assert installed.run("python", ROOT / "tests/cpu_checks.py").strip().endswith("cases passed")


def test_a_clip_of_the_demo_model(installed: Installed, tmp_path: Path) -> None:
    out, dump = tmp_path / "out", tmp_path / "perf.json"
    installed.run(
        *("ditattn", "generate", "--prompt", "a big red circle moves right on a blue background", "--num-inference-steps", 4),
        *("--attention-backend", "permuted_sparse_attn", "--attention-backend-config", "skip_first_steps=1", "--strict"),
        *("--output-path", out, "--perf-dump-path", dump),
    )
    (clip,) = out.glob("*.mp4")
    assert clip.stat().st_size > 1000
    assert dump.exists()


def test_an_sdist_without_a_compiler_installs_and_says_what_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "environment"
    bare = _install(_distribution("*.tar.gz"), folder, PATH=str(folder / "bin"))
    rows = json.loads(bare.run("ditattn", "backends", "--json", "--device", "cpu"))["backends"]
    reasons = {row["reason"] for row in rows if row["implementation"] == "cpu"}
    assert len(reasons) == 1
    assert "no C++ compiler was found (looked for g++, clang++, c++). Install g++ or clang" in reasons.pop()
