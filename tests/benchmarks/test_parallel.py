"""The benchmark of several processes: its bytes, and what it prints. Its runs are those of tests/cli/test_ranks.py."""

from __future__ import annotations

from types import SimpleNamespace

import benchmarks.parallel as bench

CONFIG = SimpleNamespace(num_attention_heads=4, attention_head_dim=64)
WHOLE = 17 * 16 * 16 * 4 * 64 * 4


def test_bytes_are_those_of_the_exchange() -> None:
    assert bench.bytes_per_call(CONFIG, 1, ring=False) == 0
    # half of the own half goes to the other rank, for queries, keys, values and the result
    assert bench.bytes_per_call(CONFIG, 2, ring=False) == 4 * WHOLE // 4
    assert bench.bytes_per_call(CONFIG, 4, ring=True) == 3 * 2 * WHOLE // 4


def test_every_rank_has_a_line_and_the_slowest_is_named() -> None:
    ranks = [
        {"denoise_ms": 2000, "attention_ms": ms, "communication_ms": 100, "density": density, "own_blocks": 0, "bytes": 2**20}
        for ms, density in ((1000, 0.25), (3000, None))
    ]
    clip, first, second = bench.lines(2, 61.25, ranks)
    assert "2 processes: PSNR 61.2 dB" in clip
    assert "1.50 x the mean" in clip
    assert "rank 0" in first
    assert "density 0.250" in first
    assert "rank 1" in second
    assert "1.0 MiB sent, dense" in second
