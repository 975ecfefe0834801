"""What a test shows of which transformer class: the cells of docs/compatibility.md that it holds.

A test marked `shows(column)` holds the cells of the classes that it really served, by the reports of what ran. `tools/family_tables.py`
gathers them from a run's JUnit file into `RECORD`; afterwards each of these tests fails where the record says anything else of it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pytest

from ditattn.backends.dense import DENSE_BACKEND
from ditattn.backends.registry import load_backend
from ditattn.models import find_family
from ditattn.runtime.report import ComponentReport
from ditattn.runtime.served_model import ServedModel
from ranks import Ranks

__all__ = ["RECORD", "check", "shown", "watching"]

RECORD = Path(__file__).parent / "hosts" / "diffusers" / "compatibility.json"
"""{column: {transformer class: [word of the cell, id of a test that shows it]}}."""

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"

MAKING = "DITATTN_COMPATIBILITY_ANEW"
"""Environment variable that is set while the record is made."""

Cells = dict[tuple[str, str], str]


@contextlib.contextmanager
def watching() -> Iterator[list[ComponentReport]]:
    """Gets, at its end, the report of every denoiser that was served, in this process or by ranks that reported it."""
    served: list[ServedModel] = []
    reports: list[ComponentReport] = []
    begin, run = ServedModel.__post_init__, Ranks.run

    def note(model: ServedModel) -> None:
        begin(model)
        served.append(model)

    def note_ranks(ranks: Ranks, *args: Any) -> list[Any]:
        answers = run(ranks, *args)
        reports.extend(_reports_in(answers))
        return answers

    with mock.patch.object(ServedModel, "__post_init__", note), mock.patch.object(Ranks, "run", note_ranks):
        yield reports
    reports.extend(model.log.report() for model in served)


def _reports_in(answer: Any) -> Iterator[ComponentReport]:
    if isinstance(answer, ComponentReport):
        yield answer
    parts = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, (list, tuple)) else ()
    for part in parts:
        yield from _reports_in(part)


def shown(item: pytest.Item, reports: list[ComponentReport]) -> Cells:
    """The word of each cell (column, class) that a test holds which ended well."""
    cells: Cells = {}
    for marker in item.iter_markers("shows"):
        (column,) = marker.args
        for report in reports:
            cls = report.model.split(", served as ")[-1]
            word = marker.kwargs.get("says") or _word(report, column)
            cell = report.backend if column == "backend" else column, cls
            # of two denoisers of a class, the one that says more than "yes"
            if find_family(cls) is not None and word and cells.get(cell, "yes") == "yes":
                cells[cell] = word
    return cells


def _word(report: ComponentReport, column: str) -> str:
    """What a report shows: that sparse calls ran, or in its own column that a dense backend served the calls; else nothing."""
    if load_backend(report.backend).is_sparse:
        ran = report.sparse > 0 and (column != "references" or any("+" in grids for grids in report.token_grids))
        return "yes" if ran else ""
    if column != "backend" or report.calls == 0:
        return ""
    return "yes" if report.backend == "torch_sdpa" or DENSE_BACKEND in report.dense_reasons else "torch's SDPA: masked"


def check(item: pytest.Item, cells: Mapping[tuple[str, str], str]) -> None:
    """Fail where the record says of a test what it does not show, or lacks a cell that it shows.

    The record is of the diffusers that is pinned: others may mask or dispatch otherwise.
    """
    if MAKING in os.environ or f"diffusers=={diffusers.__version__}" not in CONSTRAINTS.read_text().split():
        return
    record = json.loads(RECORD.read_text())
    held = {(column, cls): word for column, row in record.items() for cls, (word, test) in row.items() if test == item.nodeid}
    claimed = {cell: word for cell, word in held.items() if cells.get(cell) != word}
    missing = {cell: word for cell, word in cells.items() if record.get(cell[0], {}).get(cell[1], [None])[0] != word}
    if claimed or missing:
        pytest.fail(
            f"{RECORD.name} is not what this test shows (claimed, not shown: {claimed}; shown, not there: {missing}): `make compatibility`",
            pytrace=False,
        )
