"""The demo model on an NVIDIA GPU through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ditattn.cli.app import run
from ditattn.packages import DIFFUSERS

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
    pytest.mark.skipif(DIFFUSERS.missing(), reason=DIFFUSERS.sentence()),
]


def test_compare(tmp_path: Path) -> None:
    arguments = ["compare", "--prompt", "a big red circle moves right on a blue background", "--device", "cuda", "--dtype", "bfloat16"]
    arguments += ["--attention-backend", "permuted_sparse_attn", "--grid", "sparsity=0.5,0.75"]
    # its clips are short for a GPU
    arguments += ["--attention-backend-config", "min_tokens=0"]
    assert run([*arguments, "--output-path", str(tmp_path), "--no-reference-cache", "--output-file-name", "gpu"]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["reference"]["clips"]
    densities = []
    for setting in found["settings"]:
        # what a wrong kernel makes is far below; on a CPU the two reach 36 and 29 dB
        assert float(setting["statistics"]["psnr"]["worst"]) > 24
        densities.append(float(setting["statistics"]["overall_density"]["worst"]))
    assert 0.3 < densities[1] < densities[0] < 0.7
