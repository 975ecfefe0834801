"""`ditattn backends`: every backend and implementation on this machine, with the reason where one cannot run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from ditattn.cli.availability import QuantizationRow, Row

__all__ = ["backends"]

AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON, for programs.")]
OnlyDevice = Annotated[str | None, typer.Option("--device", help="Only this device type: cpu, cuda, npu, ...", show_default="all")]
Debug = Annotated[bool, typer.Option("--debug", metavar="", help="Show the traceback of an error.")]


def backends(as_json: AsJson = False, device: OnlyDevice = None, debug: Debug = False) -> None:
    """List every attention backend and quantisation, and what computes it on this machine: ready or not, and what installs what is missing.

    "serves" marks the implementation that runs when you name the backend (for bfloat16 and head size 64); a "ready" one can run too.
    Numbers lead to the reasons below the table, and to what was measured here where a measurement chooses between exact kernels.
    """
    from ditattn.backends.registry import left_out
    from ditattn.cli.availability import availability, devices, quantization_availability

    facts, rows, quantized = devices(device), availability(device), quantization_availability(device)
    if as_json:
        lists: dict[str, Sequence[Any]] = {"backends": rows, "quantization": quantized, "left_out": left_out()}
        typer.echo(json.dumps({"devices": facts, **{name: list(map(vars, found)) for name, found in lists.items()}}, indent=2))
        return
    _print_table(facts, rows, quantized)
    for one in left_out():
        typer.echo(one.sentence())


def _print_table(facts: list[dict[str, Any]], rows: list[Row], quantized: list[QuantizationRow]) -> None:
    from rich.text import Text

    from ditattn.cli.terminal import print_rich

    entries = [_entry(row, row.backend, row.note) for row in rows] + [_entry(row, row.quantization, None) for row in quantized]
    sentences = dict.fromkeys(entry.sentence for entry in entries if entry.sentence)
    notes = {sentence: number for number, sentence in enumerate(sentences, 1)}
    states = [Text("none: ", "red").append(fact["reason"], "default") if fact["reason"] else Text(fact["name"], "green") for fact in facts]
    devices = [Text(f"{fact['device']}: ", "bold").append_text(state) for fact, state in zip(facts, states, strict=True)]
    reasons = [Text(f"({number}) {sentence}") for sentence, number in notes.items()]
    if reasons:
        reasons.insert(0, Text())
    named = {**_by_kind(rows), "quantisation": list(dict.fromkeys(row.quantization for row in quantized))}
    kinds = [Text(f"{kind}: {', '.join(names)}") for kind, names in named.items() if names]
    print_rich(*devices, "", *kinds, "", _table(entries, notes), *reasons)


class Entry(NamedTuple):
    """What the table shows of a row."""

    device: str
    name: str
    operation: str
    word: str
    sentence: str | None
    implementation: str


def _entry(row: Row | QuantizationRow, name: str, note: str | None) -> Entry:
    word = "serves" if row.serves else "ready" if row.reason is None else "no"
    return Entry(row.device, name, row.operation, word, row.reason or note, row.implementation)


def _by_kind(rows: list[Row]) -> dict[str, list[str]]:
    sparse = {row.backend: row.sparse for row in rows}
    return {kind: [name for name in sparse if sparse[name] is (kind == "sparse")] for kind in ("dense", "sparse")}


def _table(entries: list[Entry], notes: dict[str, int]) -> Table:
    """Rows that differ only in the implementation share a line; "serves" has its own. Reasons are long and few, hence the notes."""
    from rich.table import Table
    from rich.text import Text

    merged: dict[tuple[str, str, str, str], list[str]] = {}
    for entry in entries:
        state = f"{entry.word} ({notes[entry.sentence]})" if entry.sentence else entry.word
        merged.setdefault((entry.device, entry.name, entry.operation, state), []).append(entry.implementation)
    table = Table("device", "backend", "operation", "state", "by", box=None, pad_edge=False)
    style = {"serves": "bold green", "ready": "green"}
    for (device, backend, operation, state), names in merged.items():
        table.add_row(device, backend, operation, Text(state, style.get(state.split()[0], "red")), ", ".join(names))
    return table
