"""The floors of the house, and the checker of what import-linter cannot say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import check_imports as checker  # noqa: E402


@pytest.mark.parametrize(
    ("module", "target", "reason"),
    [
        ("ditattn.tune.search", "torchmetrics.functional.image", "torchmetrics is imported only under"),
        ("ditattn.backends.rain_fusion_attn", "ditattn.backends.laser_attn", "do not know each other"),
        ("ditattn.backends.fa", "ditattn.backends.block_sparse_attn", "do not know each other"),
        ("ditattn.backends.rain_fusion_attn", "ditattn.backends.permuted_sparse_attn.means", "do not know each other"),
        ("ditattn.backends.permuted_sparse_attn.means", "ditattn.backends.rain_fusion_attn", "do not know each other"),
        ("ditattn.backends.selection.mean_pool", "ditattn.backends.selection.antidiagonal", "do not know each other"),
        ("ditattn.runtime.stage", "diffusers.models", "diffusers is imported only under"),
        ("ditattn.ops.block_mean.reference", "triton", "triton is imported only in files named triton"),
        ("ditattn.backends.base", "torch_npu", "torch_npu is imported only in files named"),
    ],
)
def test_violations(module: str, target: str, reason: str) -> None:
    assert reason in (checker.complaint(module, target) or "")


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("ditattn.hosts.diffusers.install", "diffusers"),
        ("ditattn.ops.dense_attention.ascend", "torch_npu"),
        ("ditattn.backends.selection.mean_pool", "torch"),
        ("ditattn.backends.rain_fusion_attn", "ditattn.backends.sparse"),
        ("ditattn.backends.permuted_sparse_attn.means", "ditattn.backends.permuted_sparse_attn.head_orders"),
        ("ditattn.backends.rain_fusion_attn", "ditattn.backends.selection.mean_pool"),
    ],
)
def test_what_is_allowed(module: str, target: str) -> None:
    assert checker.complaint(module, target) is None


@pytest.mark.parametrize(
    ("module", "target", "reason"),
    [
        ("ditattn.ops.block_estimate", "ditattn.backends.selection.antidiagonal:select", "point down"),
        ("ditattn.devices", "ditattn.ops.table:choose", "point down"),
        ("ditattn.backends.registry", "ditattn.backends.fa:NoSuchBackend", "no such module or attribute"),
        ("ditattn.backends.registry", "ditattn.backends.nearest_attn:NearestBackend", "no such module or attribute"),
        ("ditattn.ops.block_mean", "ditattn.ops.block_mean.triton:no_such_function", "no such module or attribute"),
    ],
)
def test_strings_point_down_at_things_that_exist(module: str, target: str, reason: str) -> None:
    assert reason in (checker.complaint_of_string(module, target) or "")


def test_strings_are_found() -> None:
    tree = checker.ast.parse('TABLE = {"fa": "ditattn.backends.fa:FABackend"}; text = "ditattn is a package"')
    assert list(checker.named_in_strings(tree)) == [(1, "ditattn.backends.fa:FABackend")]


def test_the_tree_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    assert checker.main() == 0, capsys.readouterr().out
    assert "ok" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "line", "problem"),
    [
        ("plan", "import ditattn.ops.table", "ditattn.plan is not allowed to import ditattn.ops"),
        ("devices", "from ditattn.backends import registry", "ditattn.devices is not allowed to import ditattn.backends"),
        ("compare", "from ditattn.hosts.diffusers.install import install", "ditattn.compare is not allowed to import ditattn.hosts"),
    ],
)
def test_an_arrow_upwards_breaks_the_contract(folder: str, line: str, problem: str, tmp_path: Path) -> None:
    """A copy of the tree with one import more, judged by import-linter as `make check` judges the tree."""
    tree = _copied_tree(tmp_path)
    with (tree / "ditattn" / folder / "__init__.py").open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    done = _lint(tree)
    assert done.returncode != 0
    assert problem in done.stdout


def _copied_tree(tmp_path: Path) -> Path:
    for path in (ROOT / "src").rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT / "src")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return tmp_path


def _lint(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--config", str(ROOT / "pyproject.toml")]
    return subprocess.run(command, capture_output=True, text=True, cwd=tree, env={"PYTHONPATH": str(tree), "PATH": ""})


def test_no_arrow_points_up(tmp_path: Path) -> None:
    done = _lint(_copied_tree(tmp_path))
    assert done.returncode == 0, done.stdout
