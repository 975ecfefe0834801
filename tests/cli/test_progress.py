"""What a terminal and a log see of long work."""

from __future__ import annotations

import io
import re

import pytest

from ditattn.cli.progress import ShownProgress, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(progress: ShownProgress) -> None:
    """Two runs of two steps after a warm-up, with a result and a table between them."""
    progress.expect(2)
    progress.begin("warm up", counts=False)
    progress.step(1, 2)
    for number in (1, 2):
        progress.begin(f"clip {number}")
        progress.step(1, 2)
        progress.step(2, 2)
        progress.advance()
        progress.note(f"result [{number}] of [red]it[/red]")
        progress.print(f"table {number}")


def test_a_log_gets_a_line_for_what_begins_and_no_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as progress:
        work(progress)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        *("warm up", "clip 1", "result [1] of [red]it[/red]", "clip 2", "result [2] of [red]it[/red]"),
    ]
    assert captured.out.splitlines() == ["table 1", "table 2"]


def test_a_terminal_gets_one_bar_that_is_gone_in_the_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    shown = []
    with progress_bar() as progress:
        task = progress._drawn.tasks[0]
        update = progress._drawn.update

        def listen(*arguments: object, **changes: object) -> None:
            update(*arguments, **changes)
            progress._drawn.refresh()
            if "count" in changes:
                shown.append((task.description, task.fields["count"], task.total and task.completed / task.total))

        progress._drawn.update = listen
        work(progress)
    assert shown == [
        # until a run has begun nobody knows how long all of it takes
        *(("warm up", "", None), ("warm up", "step 1 of 2", None), ("clip 1", "run 1 of 2", None)),
        *(("clip 1", "run 1 of 2, step 1 of 2", 0.25), ("clip 1", "run 1 of 2, step 2 of 2", 0.5), ("clip 1", "run 2 of 2", 0.5)),
        *(("clip 2", "run 2 of 2", 0.5), ("clip 2", "run 2 of 2, step 1 of 2", 0.75), ("clip 2", "run 2 of 2, step 2 of 2", 1.0)),
        ("clip 2", "run 2 of 2", 1.0),
    ]
    text = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    assert "run 1 of 2, step 1 of 2" in text
    assert re.search(r"0:00:\d\d left 0:00:\d\d", text)
    # tables are on stdout alone, and results are whole
    assert capsys.readouterr().out.splitlines() == ["table 1", "table 2"]
    assert "table" not in text
    assert "result [1] of [red]it[/red]" in text
    assert visible(text) == ["result [1] of [red]it[/red]", "result [2] of [red]it[/red]"]


def visible(text: str) -> list[str]:
    """What is left on the screen of text that moves up and erases lines."""
    lines = [""]
    row = 0
    for piece in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif piece.endswith("A") and piece.startswith("\x1b"):
            row -= int(piece[2:-1] or 1)
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif not piece.startswith("\x1b") and piece != "\r":
            lines[row] += piece
    return [line for line in lines if line]


def test_steps_without_a_number_of_them_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    with progress_bar() as progress:
        progress.expect(1)
        progress.begin("denoise")
        progress.step(3, None)
        task = progress._drawn.tasks[0]
        assert (task.fields["count"], task.total) == ("step 3", None)
