"""`ditattn bench`: how fast attention is on this machine's CPU."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated

import typer

__all__ = ["bench"]

Rounds = Annotated[int, typer.Option(min=1, help="Times that every call is measured; the medians are shown. Fewer where the budget ends.")]
Budget = Annotated[
    float,
    typer.Option(min=1, help="Seconds per table. What is too slow for its share runs once, at a smaller size, and the table says so."),
]
Quick = Annotated[bool, typer.Option("--quick", metavar="", help="Shorter sequences and no whole video: about two minutes instead of ten.")]
NoFlex = Annotated[bool, typer.Option("--no-flex", metavar="", help="Without FlexAttention, which compiles for a minute.")]
AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object, for programs; the tables go to stderr.")]
Debug = Annotated[bool, typer.Option("--debug", metavar="", help="Show the traceback of an error.")]


def bench(
    rounds: Rounds = 7, budget: Budget = 90, quick: Quick = False, no_flex: NoFlex = False, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Measure attention on this CPU: the compiled kernels against torch's SDPA, gather + SDPA, FlexAttention and a plain matrix product.

    oneDNN's graph takes part where it takes the call, zentorch and vLLM where they are installed. Every call is compared with the
    reference before it is timed.

    All calls of a table take turns, and ratios are taken within a round. Leave the machine alone meanwhile.

    The environment variable DITATTN_CPU_ISA chooses other kernels than the best: avx2, avx512, ...
    """
    from ditattn.bench import suite
    from ditattn.bench.timing import Effort
    from ditattn.cli.progress import progress_bar

    sizes = suite.QUICK if quick else suite.FULL
    with progress_bar() as progress:
        effort = Effort(rounds, budget, progress.begin)
        answers = suite.ask(sizes, effort, not no_flex, partial(progress.print, err=as_json), progress)
    if as_json:
        typer.echo(json.dumps(answers.as_dict()))
