"""Attention on this CPU: the compiled kernel against torch and its peers.

    python -m benchmarks.cpu_attention            about ten minutes; --quick: two
    python -m benchmarks.cpu_attention --json     one line for machines instead of tables
    python -m benchmarks.cpu_attention --record   also append that line to benchmarks/results/cpu_attention.jsonl

Times are medians of interleaved rounds in one process, ratios are taken within a round. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from ditattn.measurement.cpu_attention import Measured, measure_growth, measure_shape, measure_video, render, render_machine
from ditattn.measurement.timing import machine

RESULTS = Path(__file__).parent / "results/cpu_attention.jsonl"

# wan2.1-1.3b-480p-81f
VIDEO = (21, 30, 52)


def measure(rounds: int, quick: bool, flex: bool) -> Iterator[Measured]:
    """The questions one by one, as they are answered."""
    length = 4096 if quick else 8192
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in (128, 64):
            yield measure_shape(length, 4, head_dim, dtype, rounds, flex and head_dim == 128)
    yield measure_shape(length, 4, 128, torch.float16, rounds)
    lengths = (2048, 4096, 8192, 16384) if quick else (2048, 4096, 8192, 16384, 32768, 65536)
    yield measure_growth(lengths, 1, 128, torch.bfloat16, rounds)
    if not quick:
        yield measure_video(VIDEO, 12, 128, torch.bfloat16, max(3, rounds // 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="shorter sequences, no whole video")
    parser.add_argument("--no-flex", action="store_true", help="without FlexAttention, which compiles for a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of tables")
    parser.add_argument("--record", action="store_true", help="append the JSON line to benchmarks/results")
    options = parser.parse_args()
    torch.manual_seed(0)
    report = []
    if not options.json:
        print(render_machine(), flush=True)
    for measured in measure(options.rounds, options.quick, not options.no_flex):
        report.append(measured)
        if not options.json:
            print(render(measured), flush=True)
    line = json.dumps({"machine": machine(), "rounds": options.rounds, "seed": 0, "report": [m.as_dict() for m in report]})
    if options.json:
        print(line)
    if options.record:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
