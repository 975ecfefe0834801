"""The package of docs/adding_a_backend.md on the command line, and packages that cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ditattn.backends.registry import BACKENDS
from ditattn.cli.app import run
from ditattn.devices import DEVICES
from ditattn.tune.sensitivity import Sensitivity
from foreign_package import BROKEN, on_path, write_broken_package, write_documented_package

ROOT = Path(__file__).resolve().parents[2]

NAME, PLAIN = "nearest_attn", "plain_attn"
BACKEND = ("--attention-backend", NAME)

# 4 frames of 64 x 64 pixels: 1024 tokens, 8 blocks
CALL = ("--height", 64, "--width", 64, "--num-frames", 4, "--num-inference-steps", 2, "--guidance-scale", 1)
SPARSE = "sparsity=0.5,skip_first_steps=0,min_tokens=0,first_frame_sink=false"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site_packages")
    write_documented_package(folder)
    return folder


@pytest.fixture
def _installed(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with on_path(package):
        yield


@pytest.fixture
def request_of(wan_folder: Path, tmp_path: Path) -> Any:
    """Arguments of a verb with the tiny model."""

    def arguments(verb: str, *further: Any) -> list[Any]:
        return [verb, "--model-path", wan_folder, "--prompt", "a red circle", *CALL, *BACKEND, "--output-path", tmp_path / "out", *further]

    return arguments


def in_this_process(package, arguments):
    with on_path(package):
        assert run(arguments) == 0


def in_a_fresh_process(package, arguments):
    path = os.pathsep.join([str(ROOT / "src"), str(package)])
    command = [sys.executable, "-m", "ditattn", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
# tests/cli/test_cold_import.py has fresh ones find the backend of another package, and those import less
@pytest.mark.parametrize("generate", [in_this_process, pytest.param(in_a_fresh_process, marks=pytest.mark.long)])
def test_generate(generate, request_of, package, tmp_path):
    config = ("--attention-backend-config", f"{SPARSE},sink_blocks=2", "--strict")
    generate(package, [str(word) for word in request_of("generate", "--output-file-name", "clip", *config)])
    record = json.loads((tmp_path / "out" / "clip.json").read_text())
    component = record["attention"]["components"]["transformer"]
    assert component["backend"] == NAME
    assert component["config"]["sink_blocks"] == 2
    assert component["sparse"] == component["calls"] > 0
    assert component["sparse_density"] < 0.8


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("verb", ["generate", "compare", "tune"])
def test_a_wrong_key_is_named_before_anything_is_loaded(ditattn, request_of, verb):
    target = ("--target-psnr", 20) if verb == "tune" else ()
    done = ditattn(*request_of(verb, "--attention-backend-config", "sink_block=2", *target))
    assert done.status == 2
    assert len(done.error_lines) == 1
    assert "sink_block" in done.err
    assert "did you mean 'sink_blocks'" in done.err
    assert "load " not in done.err


@pytest.mark.slow
@pytest.mark.usefixtures("_installed")
def test_compare_measures_it_beside_ours(ditattn, request_of, tmp_path):
    pytest.importorskip("torchmetrics", reason="SSIM and MS-SSIM come from torchmetrics")
    both = ("--attention-backend", "rain_fusion_attn", "--attention-backend-config", SPARSE, "--grid", "sink_blocks=0,4")
    done = ditattn(*request_of("compare", "--output-file-name", "page", *both))
    assert done.status == 0, done.err
    # ours goes without the key that it does not have
    assert "rain_fusion_attn has no sink_blocks" in done.err
    settings = json.loads((tmp_path / "out" / "page.json").read_text())["settings"]
    densities = {setting["name"]: setting["statistics"]["overall_density"]["median"] for setting in settings}
    few, many = (next(share for name, share in densities.items() if NAME in name and f"sink_blocks={number}" in name) for number in (0, 4))
    assert few < many < 1
    assert NAME in done.out


@pytest.mark.usefixtures("_installed")
def test_tune_finds_it_a_setting(ditattn, request_of, tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics", reason="SSIM comes from torchmetrics")
    measured = Sensitivity.from_readings.__func__

    def as_if_faster(cls, *arguments):
        # the tiny model's sparse calls are slower than its dense ones
        return replace(measured(cls, *arguments), call_time_shares=(1.0, -0.9), attention_share=0.5)

    monkeypatch.setattr(Sensitivity, "from_readings", classmethod(as_if_faster))
    held = ("--attention-backend-config", "min_tokens=0,sink_blocks=2")
    done = ditattn(*request_of("tune", *held, "--target-psnr", 10, "--budget-runs", 2, "--output-file-name", "tuned"))
    # 3: it may be slower than dense on the clock
    assert done.status in (0, 3), done.err
    text = (tmp_path / "out" / "tuned.yaml").read_text()
    assert "sink_blocks: 2" in text
    assert "sparsity: " in text
    (state,) = (tmp_path / "out").glob("*.state.json")
    readings = json.loads(state.read_text())["readings"]
    # cells of every probed sparsity, and some of them not the dense one
    assert any(cell["density"] < 1 for cells in readings.values() for cell in cells)


@pytest.mark.usefixtures("_installed")
def test_the_listing_has_its_rows(ditattn):
    listing = json.loads(ditattn("backends", "--json").out)
    rows = [row for row in listing["backends"] if row["backend"] == NAME]
    assert {row["device"] for row in rows} == set(DEVICES)
    assert {row["operation"] for row in rows} == {"block_sparse_attention", "dense_attention"}
    assert all(row["sparse"] for row in rows)
    assert any(row["serves"] for row in rows if row["device"] == "cpu" and row["operation"] == "block_sparse_attention")
    assert listing["left_out"] == []
    assert f" {NAME} " in ditattn("backends", "--device", "cpu").out


@pytest.mark.usefixtures("_installed")
def test_a_backend_with_a_kernel_of_its_own_has_a_row(ditattn):
    rows = json.loads(ditattn("backends", "--json").out)["backends"]
    found = {row["device"]: row for row in rows if row["backend"] == PLAIN}
    assert set(found) == set(DEVICES)
    assert all((row["operation"], row["implementation"], row["sparse"]) == ("attention", PLAIN, False) for row in found.values())
    assert found["cpu"]["available"]
    assert found["cpu"]["serves"]
    assert all(row["available"] == row["serves"] == (row["reason"] is None) for row in found.values())


# packages that cannot be used


@pytest.fixture
def _broken(tmp_path: Path) -> Iterator[None]:
    write_broken_package(tmp_path / "site_packages")
    with on_path(tmp_path / "site_packages"):
        yield


@pytest.mark.usefixtures("_broken")
def test_the_listing_shows_what_is_left_out_and_why(ditattn):
    done = ditattn("backends", "--json", "--device", "cpu")
    assert done.status == 0, done.err
    listing = json.loads(done.out)
    assert {row["backend"] for row in listing["backends"] if row["serves"]} == set(BACKENDS)
    assert {one["name"]: one["target"] for one in listing["left_out"]} == BROKEN
    text = ditattn("backends", "--device", "cpu").out
    for one in listing["left_out"]:
        assert one["package"] == "broken_package"
        assert f"'{one['name']}' of package broken_package is left out: {one['reason']}" in text.splitlines()


@pytest.mark.usefixtures("_broken")
@pytest.mark.parametrize("name", sorted(set(BROKEN) - {"torch_sdpa"}))
def test_named_it_is_refused_in_one_line(ditattn, small, name):
    done = ditattn(*small, "--attention-backend", name)
    assert done.status != 0
    assert len(done.error_lines) == 1
    assert name in done.error_lines[0]
    assert "Traceback" not in done.err
