"""`ditattn bench`: how fast attention is on this machine's CPU."""

from __future__ import annotations

import json
from typing import Annotated

import typer

__all__ = ["bench"]

Rounds = Annotated[int, typer.Option(min=1, help="Times that every call is measured; the medians are shown. Fewer where the budget ends.")]
Budget = Annotated[
    float,
    typer.Option(min=1, help="Seconds per table. What is too slow for its share runs once, at a smaller size, and the table says so."),
]
Quick = Annotated[bool, typer.Option("--quick", help="Shorter sequences and no whole video: about two minutes instead of ten.")]
NoFlex = Annotated[bool, typer.Option("--no-flex", help="Without FlexAttention, which compiles for a minute.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs; the tables go to stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def bench(
    rounds: Rounds = 7, budget: Budget = 90, quick: Quick = False, no_flex: NoFlex = False, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Measure attention on this CPU: the compiled kernels against torch's SDPA, gather + SDPA, FlexAttention and a plain matrix product.

    All calls of a table take turns, and ratios are taken within a round. Leave the machine alone meanwhile. What is being measured is
    shown on stderr.
    The environment variable DITATTN_CPU_ISA chooses other kernels than the best: avx2, avx512, ...
    """
    from ditattn.bench import status_line, suite
    from ditattn.bench.timing import Effort

    effort = Effort(rounds, budget, status_line.show)
    sizes = suite.QUICK if quick else suite.FULL
    answers = suite.ask(sizes, effort, not no_flex, tell=lambda text: typer.echo(text, err=as_json))
    if as_json:
        typer.echo(json.dumps(answers.as_dict()))
