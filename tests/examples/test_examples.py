"""Every program of examples/ runs as it is written, on tiny pipelines."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from hub_stand_ins import hub_stand_ins as hub_stand_ins

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

ARGUMENTS = {"own_sampling_loop": ["--steps", "3", "--latents", "13", "32", "40"]}

FILES = {"wan_t2v": {"cat.mp4"}, "flux": {"lighthouse_dense.png", "lighthouse_sparse.png"}}

# what its output says: calls ran sparse
PRINTS = {
    "wan_t2v": r"permuted_sparse_attn: 4 sparse at density 0\.\d+ .* / 4 dense \(first steps: 4\)",
    "flux": r"torch_sdpa: \d+ dense[^\n]*\n.*permuted_sparse_attn: 4 sparse at density 0\.\d+ .* / 4 dense \(first steps: 4\)",
    "two_denoisers": r"transformer torch_sdpa: \d+ dense[^\n]*\ntransformer_2 permuted_sparse_attn: 4 sparse",
    "own_sampling_loop": r"permuted_sparse_attn: 8 sparse at density 0\.\d+ .* / 4 dense \(first steps: 4\)",
    "custom_backend": r"computed 0\.\d+ of the pairs, mean difference from dense attention 0\.\d+",
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PRINTS)


@pytest.mark.parametrize("name", PRINTS)
@pytest.mark.usefixtures("hub_stand_ins")
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS.get(name, [])])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.search(PRINTS[name], capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} == FILES.get(name, set())
    assert all(path.stat().st_size for path in tmp_path.iterdir())
