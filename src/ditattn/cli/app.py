"""The command `ditattn` and its verbs."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, NoReturn

import typer

from ditattn._version import __version__
from ditattn.cli import ranks
from ditattn.cli.backends import backends
from ditattn.cli.bench import bench
from ditattn.cli.models import models
from ditattn.cli.options import command
from ditattn.cli.settings import CompareSettings, GenerateSettings, TuneSettings
from ditattn.cli.terminal import EXIT_INTERRUPTED, report_failure

__all__ = ["app", "run"]

app = typer.Typer(
    name="ditattn",
    help="Dense and block-sparse attention backends for diffusion transformers: one flag, one behaviour, every device.",
    epilog="Start with: ditattn generate --prompt 'a big red circle moves right on a blue background'",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ditattn {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself; typer needs a function to hang them on."""


app.command("generate")(command(GenerateSettings, "ditattn.cli.generate:run"))
app.command("compare")(command(CompareSettings, "ditattn.cli.compare:run"))
app.command("tune")(command(TuneSettings, "ditattn.cli.tune:run"))
app.command("backends")(backends)
app.command("models")(models)
app.command("bench")(bench)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """Unwind on SIGTERM, so that half-written files are removed."""
    raise SystemExit(128 + number)


def run(arguments: Sequence[str]) -> int:
    """Run the command; every failure ends in one line on stderr. Returns the exit status."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        with ranks.quiet():
            status = typer.main.get_command(app)(args=list(arguments), prog_name="ditattn", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
        return report_failure(error, debug="--debug" in arguments, instead=ranks.speaks(error))
    finally:
        signal.signal(signal.SIGTERM, before)
    if status == EXIT_INTERRUPTED:
        # newer versions of typer turn Ctrl-C into this status, without a word
        return report_failure(KeyboardInterrupt(), debug=False, instead=ranks.speaks(KeyboardInterrupt()))
    return status if isinstance(status, int) else 0
