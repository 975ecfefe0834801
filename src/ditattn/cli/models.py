"""`ditattn models`: the families that are served here, or what would happen to one model."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ditattn.hosts.diffusers.forecast import FamilyEntry, Forecast

__all__ = ["compressed", "models"]

Model = Annotated[
    str | None, typer.Argument(help="A folder, a hub id, or a pipeline or transformer class of diffusers.", show_default="all")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a model on the hub.", show_default="main")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def models(model: Model = None, as_json: AsJson = False, revision: Revision = None, debug: Debug = False) -> None:
    """List the model families that are served, or say what would happen to one model: served how, which layers, how many tokens.

    No weights are needed: of a folder or a model on the hub, only `model_index.json` and `config.json` files are read.
    """
    from ditattn.cli.terminal import set_up_messages
    from ditattn.hosts.diffusers.forecast import families, forecast

    set_up_messages(debug)
    if model is None:
        entries = families()
        if as_json:
            typer.echo(json.dumps([asdict(entry) for entry in entries], indent=2))
        else:
            _print_families(entries)
        return
    found = forecast(model, revision)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=2))
    else:
        for one in found:
            typer.echo("\n".join(_lines(one)))


def _print_families(entries: list[FamilyEntry]) -> None:
    from rich.table import Table

    from ditattn.cli.terminal import print_rich

    table = Table("family", "class", "pipelines", "by", "notes", box=None, pad_edge=False)
    for entry in entries:
        classes = [*entry.classes, *(f"{name} (not in this diffusers)" for name in entry.missing)]
        pipelines = [name.removesuffix("Pipeline") for name in entry.pipelines]
        by = "dispatcher" if entry.dispatches else "redirected SDPA"
        table.add_row(entry.family, "\n".join(classes), ", ".join(pipelines), by, entry.notes)
    everywhere = [name for name in entries[0].backends if all(name in entry.backends for entry in entries)]
    print_rich(table, "", f"backends of every family: {', '.join(everywhere)}")
    for entry in entries:
        if set(entry.backends) != set(everywhere):
            print_rich(f"{entry.family}: {', '.join(entry.backends)}")


def _lines(one: Forecast) -> list[str]:
    """What a person reads about a denoiser."""
    head = f"{one.component}: {one.model}" if one.component != one.model else one.model
    if one.reason is not None:
        return [f"{head}: not served: {one.reason}"]
    served = one.family if str(one.family).startswith("unlisted") else f"served as {one.family}"
    lines = [f"{head}: {served}", f"  layers: {len(one.layers)} of self-attention: {compressed(one.layers)}"]
    lines.append(f"  head size: {one.head_size}")
    if one.num_tokens is not None:
        size = f"{one.size['width']} x {one.size['height']} pixels"
        size += f", {one.size['num_frames']} frames" if "num_frames" in one.size else ""
        lines.append(f"  tokens by default: {one.num_tokens} of {size}, text left out")
    can = [name for name, reason in one.backends.items() if reason is None]
    lines.append(f"  backends: {', '.join(can)}")
    lines += [f"  not {name}: {reason}" for name, reason in one.backends.items() if reason is not None]
    if one.notes:
        lines.append(f"  notes: {one.notes}")
    return lines


def compressed(paths: list[str]) -> str:
    """`blocks.0-29.attn1` for thirty paths: runs of numbers, in the order of the layers."""
    runs: list[tuple[str, int, int, str]] = []
    for path in paths:
        parts = path.split(".")
        place = next((place for place, part in enumerate(parts) if part.isdigit()), None)
        if place is None:
            runs.append((path, -1, -1, ""))
            continue
        before, number, after = ".".join(parts[:place]), int(parts[place]), ".".join(parts[place + 1 :])
        same = next((at for at, run in enumerate(runs) if (run[0], run[3]) == (before, after) and run[2] == number - 1), None)
        if same is None:
            runs.append((before, number, number, after))
        else:
            runs[same] = (before, runs[same][1], number, after)
    return ", ".join(_shown(*run) for run in runs)


def _shown(before: str, first: int, last: int, after: str) -> str:
    if first < 0:
        return before
    return ".".join(part for part in (before, str(first) if first == last else f"{first}-{last}", after) if part)
