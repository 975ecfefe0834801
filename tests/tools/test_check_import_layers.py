"""The checker of the import floors catches what it is there for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import check_import_layers as checker


@pytest.mark.parametrize(
    ("module", "target", "reason"),
    [
        ("ditattn.ops.dense_attention.reference", "ditattn.attention.backends.fa", "imports point down"),
        ("ditattn.platforms.cpu", "ditattn.pipelines.report", "imports point down"),
        ("ditattn.attention.backends.rain_fusion_attn", "ditattn.attention.backends.laser_attn", "do not know each other"),
        ("ditattn.attention.selection.mean_pool", "ditattn.attention.selection.antidiagonal", "do not know each other"),
        ("ditattn.pipelines.denoising", "diffusers.models", "diffusers is imported only under"),
        ("ditattn.ops.block_mean.reference", "triton", "triton is imported only in files named triton"),
        ("ditattn.attention.interface", "torch_npu", "torch_npu is imported only in files named"),
    ],
)
def test_violations(module: str, target: str, reason: str) -> None:
    assert reason in (checker.complaint(module, target) or "")


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("ditattn.pipelines.diffusers.install", "diffusers"),
        ("ditattn.cli.generate", "ditattn.pipelines.diffusers.install"),
        ("ditattn.ops.block_mean", "ditattn.attention.plan"),
        ("ditattn.ops.dense_attention.ascend", "torch_npu"),
        ("ditattn.attention.selection.mean_pool", "torch"),
    ],
)
def test_what_is_allowed(module: str, target: str) -> None:
    assert checker.complaint(module, target) is None


def test_the_tree_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    assert checker.main() == 0
    assert "ok" in capsys.readouterr().out
