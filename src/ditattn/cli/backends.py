"""`ditattn backends`: every backend and implementation on this machine, with the reason where one cannot run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from ditattn.cli.availability import Row

__all__ = ["backends"]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
OnlyDevice = Annotated[str | None, typer.Option("--device", help="Only this device type: cpu, cuda, npu, ...", show_default="all")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def backends(as_json: AsJson = False, device: OnlyDevice = None, debug: Debug = False) -> None:
    """List every attention backend and what computes it on this machine: ready or not, why not, and what installs what is missing.

    The implementation marked "serves" is the one that runs when you name the backend (for bfloat16 and head size 64).
    """
    from ditattn.cli.availability import availability, devices

    facts, rows = devices(device), availability(device)
    if as_json:
        typer.echo(json.dumps({"devices": facts, "backends": [vars(row) for row in rows]}, indent=2))
        return
    _print_table(facts, rows)


def _print_table(facts: list[dict[str, Any]], rows: list[Row]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        # a pipe has no width: one row, one line
        console = Console(width=2000)
    with console.capture() as capture:
        for fact in facts:
            state = Text("none: ", "red").append(fact["reason"], "default") if fact["reason"] else Text(fact["name"], "green")
            console.print(Text(f"{fact['device']}: ", "bold").append_text(state))
        console.print()
        console.print(_table(rows))
    typer.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _table(rows: list[Row]) -> Table:
    """Rows that differ only in the implementation share a line; "serves" has its own."""
    from rich.table import Table
    from rich.text import Text

    merged: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        state = "serves" if row.serves else "ready" if row.available else "no"
        merged.setdefault((row.device, row.backend, row.operation, state, row.reason or ""), []).append(row.implementation)
    table = Table("device", "backend", "operation", "by", "state", box=None, pad_edge=False)
    table.add_column("why not, and what helps", overflow="fold")
    style = {"serves": "bold green", "ready": "green", "no": "red"}
    for (device, backend, operation, state, reason), names in merged.items():
        table.add_row(device, backend, operation, ", ".join(names), Text(state, style[state]), Text(reason))
    return table
