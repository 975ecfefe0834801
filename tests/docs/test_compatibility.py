"""The tables of families in docs/compatibility.md say what tests showed, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from xml.sax.saxutils import quoteattr

import diffusers
import pytest

import ditattn
import forked
import shown
import tiny_pipelines
from ditattn.backends.dense import DENSE_BACKEND
from ditattn.backends.registry import BACKENDS
from ditattn.models import MODELS
from ditattn.runtime.key_padding import MASK_WITH_GAPS
from ditattn.runtime.report import ComponentLog, ComponentReport
from ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]
RUN = "make compatibility"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import family_tables

    return family_tables


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], bool]]:
    """Tests that hold cells: their columns, and whether they are skipped here."""
    said = tmp_path_factory.mktemp("collected") / "said"
    with said.open("wb") as file:
        process = forked.start("collected_shows", [str(ROOT / "tests/hosts/diffusers")], {}, file.fileno())
        process.join()
    text = said.read_text(encoding="utf-8")
    assert process.exitcode == 0, text
    return json.loads(text.splitlines()[-1])


def cells(record: dict[str, dict[str, tuple[str, str]]]) -> Iterator[tuple[str, str, str]]:
    """(column, class, test id)."""
    return ((column, cls, test) for column, row in record.items() for cls, (_, test) in row.items())


def test_the_page_says_what_is_kept(tables: ModuleType) -> None:
    page = tables.PAGE.read_text()
    assert page == tables.with_tables(page, tables.read_record()), RUN


def test_what_is_kept_is_written_as_the_tool_writes_it(tables: ModuleType) -> None:
    assert tables.RECORD.read_text() == tables.written(tables.read_record()), RUN


def test_every_cell_names_a_test_that_runs_and_holds_its_column(tables: ModuleType, collected: dict[str, tuple[list[str], bool]]) -> None:
    wrong = {}
    for column, cls, test in cells(tables.read_record()):
        columns, skipped = collected.get(test, ([], False))
        if skipped or column not in (*columns, *(BACKENDS if "backend" in columns else ())):
            wrong[column, cls] = f"{test}: {'skipped' if skipped else columns or 'no such test'}"
    assert not wrong, RUN


def test_every_column_that_a_test_holds_is_a_column(tables: ModuleType, collected: dict[str, tuple[list[str], bool]]) -> None:
    held = {column for columns, _ in collected.values() for column in columns}
    assert held <= {"backend", *BACKENDS, *tables.FEATURES}
    assert held >= set(tables.FEATURES)


def test_every_class_is_run_by_every_backend(tables: ModuleType) -> None:
    record = tables.read_record()
    for backend in BACKENDS:
        assert set(record[backend]) == {cls for family in MODELS for cls in family.transformer_classes}, backend


def junit(folder: Path, *cases: tuple[str, list[list[str]], str]) -> Path:
    """A file of results: test id, the cells that it shows, what else JUnit says of it."""
    told = [(json.dumps({"test": test, "cells": shown}), more) for test, shown, more in cases]
    text = "".join(
        f'<testcase name="a test"><properties><property name="shows" value={quoteattr(value)}/></properties>{more}</testcase>'
        for value, more in told
    )
    (folder / "results.xml").write_text(f"<testsuites><testsuite>{text}</testsuite></testsuites>")
    return folder / "results.xml"


WAN = "WanTransformer3DModel"


def test_results_become_a_record(tables: ModuleType, tmp_path: Path) -> None:
    results = junit(tmp_path, ("b", [["fa", WAN, "yes"]], ""), ("a", [["fa", WAN, "yes"], ["ring", WAN, "yes"]], ""), ("c", [], ""))
    record = tables.gathered(results)
    assert record == {"fa": {WAN: ("yes", "a")}, "ring": {WAN: ("yes", "a")}}
    row = next(line for line in tables.with_tables(tables.PAGE.read_text(), record).splitlines() if line.startswith("| Wan 2.1"))
    assert row.startswith(f"| Wan 2.1, Wan 2.2 | `{WAN}` | | yes | | |")


@pytest.mark.parametrize(
    ("cases", "message"),
    [
        ([("a", [], "<failure/>")], "tests failed"),
        ([("a", [], "<error/>")], "tests failed"),
        ([("a", [], "<skipped/>")], "no test of .* is marked `shows`"),
        ([("a", [["fa", WAN, "yes"]], ""), ("b", [["fa", WAN, "no: padded"]], "")], "a shows 'yes', b shows 'no: padded'|b shows"),
    ],
    ids=["failure", "error", "nothing", "two words"],
)
def test_results_that_make_no_record(
    tables: ModuleType, tmp_path: Path, cases: list[tuple[str, list[list[str]], str]], message: str
) -> None:
    with pytest.raises(tables.Refused, match=message):
        tables.gathered(junit(tmp_path, *cases))


def test_a_column_that_the_page_lacks_is_refused(tables: ModuleType) -> None:
    with pytest.raises(tables.Refused, match="no column for sideways"):
        tables.with_tables(tables.PAGE.read_text(), {"sideways": {WAN: ("yes", "a")}})


def test_some_classes_of_a_family_are_named(tables: ModuleType) -> None:
    page = tables.with_tables(tables.PAGE.read_text(), {"ring": {"BriaTransformer2DModel": ("yes", "a")}})
    assert "| `BriaTransformer2DModel`: yes |" in page


def test_a_test_that_does_not_show_what_is_kept_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "RECORD", tmp_path / "record.json")
    monkeypatch.delenv(shown.MAKING, raising=False)
    shown.RECORD.write_text(json.dumps({"ring": {WAN: ["yes", "a"]}}))
    one, another = SimpleNamespace(nodeid="a"), SimpleNamespace(nodeid="b")
    for item in (one, another):
        shown.check(item, {("ring", WAN): "yes"})
    shown.check(another, {})
    for item, cells_of_it in ((one, {}), (one, {("ring", WAN): "no"}), (another, {("ring", WAN): "no"}), (another, {("fa", WAN): "yes"})):
        with pytest.raises(pytest.fail.Exception, match=RUN):
            shown.check(item, cells_of_it)
    monkeypatch.setenv(shown.MAKING, "1")
    shown.check(one, {})
    monkeypatch.delenv(shown.MAKING)
    monkeypatch.setattr(diffusers, "__version__", "0.38.0")
    shown.check(one, {})


def report(
    backend: str, model: str = WAN, calls: int = 4, sparse: int = 4, grids: str = "1x8x8", dense: str = DENSE_BACKEND
) -> ComponentReport:
    log = ComponentLog("transformer", backend, {})
    log.model = model
    return replace(log.report(), calls=calls, sparse=sparse, token_grids={grids: 1}, dense_reasons={dense: calls - sparse})


@pytest.mark.parametrize(
    ("ran", "column", "says", "expected"),
    [
        (report("block_sparse_attn"), "ring", None, {("ring", WAN): "yes"}),
        (report("block_sparse_attn"), "backend", None, {("block_sparse_attn", WAN): "yes"}),
        (report("block_sparse_attn", sparse=0), "ring", None, {}),
        (report("block_sparse_attn", sparse=0), "backend", None, {}),
        (report("fa", sparse=0), "backend", None, {("fa", WAN): "yes"}),
        (report("fa", sparse=0), "ring", None, {}),
        (report("fa", calls=0, sparse=0), "backend", None, {}),
        (report("fa", calls=0, sparse=0), "fa", "no: padded", {("fa", WAN): "no: padded"}),
        (report("fa", sparse=0, dense=MASK_WITH_GAPS), "backend", None, {("fa", WAN): "torch's SDPA: masked"}),
        (report("torch_sdpa", sparse=0, dense=MASK_WITH_GAPS), "backend", None, {("torch_sdpa", WAN): "yes"}),
        (report("block_sparse_attn"), "references", None, {}),
        (report("block_sparse_attn", grids="1x8x8 + 1x4x4"), "references", None, {("references", WAN): "yes"}),
        (report("block_sparse_attn", model=f"Mine, served as {WAN}"), "ring", None, {("ring", WAN): "yes"}),
        (report("block_sparse_attn", model="Mine, unlisted: by rule"), "ring", None, {}),
    ],
)
def test_what_ran_is_what_a_test_shows(ran: ComponentReport, column: str, says: str | None, expected: dict[tuple[str, str], str]) -> None:
    marked = SimpleNamespace(iter_markers=lambda _: [pytest.mark.shows(column, says=says).mark])
    assert shown.shown(marked, [ran]) == expected


def test_of_two_denoisers_of_a_class_the_one_with_a_mask_counts() -> None:
    marked = SimpleNamespace(iter_markers=lambda _: [pytest.mark.shows("backend").mark])
    both = [report("fa", sparse=0), report("fa", sparse=0, dense=MASK_WITH_GAPS)]
    for reports in (both, both[::-1]):
        assert shown.shown(marked, reports) == {("fa", WAN): "torch's SDPA: masked"}


def test_what_is_served_meanwhile_is_seen() -> None:
    tiny = tiny_pipelines.wan()
    with shown.watching() as reports, ditattn.install(tiny.pipe, "torch_sdpa"):
        tiny.run(1)
    assert [(one.model, one.backend, one.calls) for one in reports] == [(WAN, "torch_sdpa", 4)]


def test_what_ranks_report_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "run", lambda *_: [{"report": report("fa"), "error": 0.0}, (report("torch_sdpa"), None)])
    with shown.watching() as reports:
        assert len(Ranks.run(None, len)) == 2
    assert [one.backend for one in reports] == ["fa", "torch_sdpa"]
