"""The benchmark of several processes: its bytes, its counting, what it prints, and the demo clip on two processes."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import benchmarks.parallel as bench
import pytest
from benchmarks.kept_pairs import CONDITIONED, VIDEO, kept_pairs, over_mean

import forked

CONFIG = SimpleNamespace(num_attention_heads=4, attention_head_dim=64)
WHOLE = 17 * 16 * 16 * 4 * 64 * 4


def test_bytes_are_those_of_the_exchange() -> None:
    of_tensor = {ranks: bench.bytes_of_tensor(CONFIG, ranks, 17) for ranks in (1, 2, 4)}
    assert bench.bytes_per_call(of_tensor[1], 1, ring=False) == 0
    # half of the own half goes to the other rank, for queries, keys, values and the result
    assert bench.bytes_per_call(of_tensor[2], 2, ring=False) == 4 * WHOLE // 4
    assert bench.bytes_per_call(of_tensor[4], 4, ring=True) == 3 * 2 * WHOLE // 4
    # three quarters of the own queries go to other ranks, and as many results
    assert bench.bytes_of_deal(of_tensor[4], 4) == 2 * 3 * WHOLE // 16


def test_every_rank_has_a_line_and_the_slowest_is_named() -> None:
    ranks = [
        {"denoise_ms": 2000, "attention_ms": ms, "communication_ms": 100, "density": density, "own_blocks": 0, "bytes": 2**20}
        for ms, density in ((1000, 0.25), (3000, None))
    ]
    clip, first, second = bench.lines(2, 61.25, 30, ranks)
    assert "2 processes: PSNR 61.2 dB against one, 30.0 dB against dense" in clip
    assert "1.50 x the mean" in clip
    assert "rank 0" in first
    assert "density 0.250" in first
    assert "rank 1" in second
    assert "1.0 MiB sent, dense" in second


@pytest.mark.parametrize("backend", ["block_sparse_attn", "rain_fusion_attn", "permuted_sparse_attn"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_differ_by_less_than_a_tenth_at_the_size_of_real_videos(backend: str, ranks: int) -> None:
    pairs = kept_pairs(backend, VIDEO, ranks, 0.75, deals=True)
    assert max(pairs) < 1.1 * sum(pairs) / ranks


@pytest.mark.parametrize(("backend", "ranks"), [("block_sparse_attn", 4), ("rain_fusion_attn", 8)])
def test_so_they_do_where_conditions_stand_before_the_video(backend: str, ranks: int) -> None:
    pairs = kept_pairs(backend, CONDITIONED, ranks, 0.75, deals=True)
    assert max(pairs) < 1.1 * sum(pairs) / ranks
    alone = kept_pairs(backend, CONDITIONED, ranks, 0.75, deals=False)
    assert max(alone) > 1.4 * sum(alone) / ranks


def test_blocks_of_queries_that_are_dealt_out_leave_ranks_equal_behind_conditions() -> None:
    pairs, alone = (kept_pairs("permuted_sparse_attn", CONDITIONED, 8, 0.75, deals=deals) for deals in (True, False))
    assert max(pairs) < 1.02 * sum(pairs) / 8
    assert max(alone) > 1.08 * sum(alone) / 8


def test_without_the_deal_the_first_rank_works_longest() -> None:
    pairs = kept_pairs("rain_fusion_attn", VIDEO, 8, 0.75, deals=False)
    assert max(pairs) == pairs[0] > 1.7 * sum(pairs) / 8


def test_every_rank_is_told_over_the_mean() -> None:
    assert over_mean([30, 10, 20]) == "slowest 1.50: 1.50 0.50 1.00"


def _forked_ranks(processes: int, arguments: Sequence[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [forked.start("benchmarks.parallel", arguments, {**shared, "RANK": str(rank)}) for rank in range(processes)]
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * processes


@pytest.mark.slow
# torchrun costs more than what it starts, and tests/cli/test_ranks.py holds that it does the same
@pytest.mark.parametrize("start", [_forked_ranks, pytest.param(bench.start_ranks, marks=pytest.mark.long)], ids=["forked", "torchrun"])
def test_two_processes_make_the_demo_clip_of_one(
    start: Callable[[int, Sequence[str]], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "start_ranks", start)
    # one dense step, one sparse, of ten blocks
    bench.main(["--processes", "1", "2", "--steps", "2", "--num-frames", "5", "--backend", "rain_fusion_attn"])
    said = capsys.readouterr().out
    psnr = [float(found) for found in re.findall(r"PSNR (\S+) dB against one", said)]
    assert len(psnr) == 2
    # frames of 8 bits: a rounding that differs moves single values by one
    assert psnr[1] > 60
    assert len(re.findall(r"density 0\.\d+", said)) == 3
