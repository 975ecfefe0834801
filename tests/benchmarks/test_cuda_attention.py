"""The CUDA benchmark on a machine without a GPU: what it says there, and its plumbing with arms that run on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import benchmarks.cuda_attention as bench
import pytest
import torch
from benchmarks.cuda_peers import PEERS, _every_pair, full_blocks

from ditattn.ops.block_sparse_attention.flex import block_mask
from ditattn.plan.block_plan import BlockPlan

ROOT = Path(__file__).parents[2]

PLUMBING = """
import json, sys, time
from pathlib import Path
import benchmarks.cuda_attention as bench

bench.DENSE_ARMS = ("flash",)
arms = ("flash", "torch", "cuda_only", "permuted_sparse_attn", "rain_fusion_attn")
refused = bench.check_arms("cpu", ("flash", "torch", "cuda_only"))
shape = bench.Shape("tiny", (2, 9, 20), heads=2, text=30, dim=32)
rows = bench.measure(shape, "cpu", 2, time.monotonic() + 60, refused, arms, (0.5,))
bench.print_table(rows)
bench.write(rows, {"device": "cpu"}, Path(sys.argv[1]))
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_fails() -> None:
    done = python("-m", "benchmarks.cuda_attention")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["no NVIDIA GPU here (torch sees no CUDA device): nothing was measured"]


def test_plumbing(tmp_path: Path) -> None:
    results = tmp_path / "new" / "results.jsonl"
    done = python("-c", PLUMBING, str(results))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    whole = ["permuted_sparse_attn", "- attention alone", "rain_fusion_attn", "- attention alone"]
    assert [row["arm"] for row in rows] == ["flash", "torch", "cuda_only", *whole]
    timed = [row for row in rows if row["arm"] != "cuda_only"]
    assert all(len(row["samples_ms"]) == 2 and row["median_ms"] > 0 and row["problem"] is None for row in timed)
    # 390 tokens, 2 heads of 32: the dense row counts every pair
    assert rows[0]["tflops"] == pytest.approx(4 * 32 * 2 * 390**2 / rows[0]["median_ms"] / 1e9)
    assert 0.4 < rows[1]["density"] < 0.6
    assert "no implementation named 'cuda_only'" in rows[2]["problem"]
    assert "no implementation named 'cuda_only'" in done.stdout


def test_the_profile_of_a_call_names_its_operations() -> None:
    told = bench.profile_call(bench.Shape("tiny", (2, 9, 20), heads=2, text=30, dim=32), "permuted_sparse_attn", 0.5, "cpu")
    assert told.startswith("tiny, permuted_sparse_attn at 0.5: queued in ")
    assert "ditattn::tail_cost" in told


def test_peers_that_cannot_run_are_refused_with_the_reason_and_listed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused = bench.check_arms("cpu", tuple(PEERS))
    assert set(refused) == {"flex_flash", "flash_attn_4"}
    for reason in refused.values():
        assert reason == "flash-attn-4 runs on cuda, not on cpu" or (
            "package 'flash_attn.cute' is missing" in reason and "pip install --pre flash-attn-4" in reason
        )
    shape = bench.Shape("tiny", (2, 9, 20), heads=2, text=30, dim=32)
    rows = bench.measure(shape, "cpu", 1, 0.0, refused, tuple(PEERS), (0.5,))
    assert {row.arm: row.problem for row in rows} == refused
    bench.print_table(rows)
    printed = capsys.readouterr().out
    assert all(reason in printed for reason in refused.values())


def test_a_torch_without_the_back_end_is_refused_and_does_not_run_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.nn.attention.flex_attention._Backend")
    assert "has no back end FLASH" in bench.check_arms("cpu", ("flex_flash",))["flex_flash"]


def test_a_peer_that_ignores_the_plan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As flash-attn-4 does on some GPUs: dense attention instead."""
    monkeypatch.setitem(PEERS, "flash_attn_4", lambda q, k, v, plan: lambda: bench.dense_attention(q, k, v))
    assert bench.check_arms("cpu", ("flash_attn_4",))["flash_attn_4"].startswith("wrong: relative error")


def test_plans_as_the_lists_of_flash_attn_4() -> None:
    mask = torch.rand(1, 2, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0, 0, 1] = False
    plan = BlockPlan.from_mask(mask, 500, 600).trimmed()
    lists = full_blocks(plan)
    assert lists.block_size == (128, 128)
    assert lists.mask_block_cnt.count_nonzero() == 0
    assert all(x.dtype == torch.int32 for x in lists[:4])
    assert lists.mask_block_idx.shape == lists.full_block_idx.shape == plan.indices.shape
    # block numbers everywhere, also past the counts
    assert 0 <= lists.full_block_idx.min() <= lists.full_block_idx.max() < 5
    listed = torch.zeros_like(mask)
    for row in torch.cartesian_prod(torch.arange(2), torch.arange(4)):
        head, block = row.tolist()
        listed[0, head, block, lists.full_block_idx[0, head, block, : lists.full_block_cnt[0, head, block]].long()] = True
    assert torch.equal(listed, mask)


def test_the_mask_function_that_flash_needs_hides_nothing() -> None:
    plan = BlockPlan.full(300, 300)
    mask = block_mask(plan, mask_mod=_every_pair)
    assert mask.mask_mod is _every_pair
    assert _every_pair(*(torch.arange(300) for _ in range(4))).all()
    assert mask.kv_num_blocks.count_nonzero() == 0
    assert torch.equal(mask.full_kv_num_blocks, plan.counts)
