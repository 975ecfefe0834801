"""Attention on this CPU: the compiled kernel against torch and its peers. `ditattn bench` with --record.

    python -m benchmarks.cpu_attention            about ten minutes; --quick: two
    python -m benchmarks.cpu_attention --json     one line for machines instead of tables
    python -m benchmarks.cpu_attention --record   also append that line to benchmarks/results/cpu_attention.jsonl

Times are medians of interleaved rounds in one process, ratios are taken within a round. Leave the machine alone meanwhile.
What is being measured is shown on stderr; what is too slow for its share of --budget runs once, at a smaller size, and is marked.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ditattn.bench import suite
from ditattn.bench.timing import Effort
from ditattn.cli.progress import progress_bar

RESULTS = Path(__file__).parent / "results/cpu_attention.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="at most, where the budget is enough")
    parser.add_argument("--budget", type=float, default=90, help="seconds per table")
    parser.add_argument("--quick", action="store_true", help="shorter sequences, no whole video")
    parser.add_argument("--no-flex", action="store_true", help="without FlexAttention, which compiles for a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of tables")
    parser.add_argument("--record", action="store_true", help="append the JSON line to benchmarks/results")
    options = parser.parse_args()
    with progress_bar() as progress:
        tell = (lambda text: None) if options.json else progress.print
        effort = Effort(options.rounds, options.budget, progress.begin)
        answers = suite.ask(suite.QUICK if options.quick else suite.FULL, effort, not options.no_flex, tell, progress)
    line = json.dumps(answers.as_dict())
    if options.json:
        print(line)
    if options.record:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
