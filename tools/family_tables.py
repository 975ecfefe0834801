"""Writes the tables of model families in docs/compatibility.md from what tests showed.

    make compatibility                                  # runs the tests and does both of:
    python tools/family_tables.py results.xml           # keeps what the tests of JUnit files showed, and writes the tables
    python tools/family_tables.py                       # writes the tables of what is kept

What is kept is `tests/hosts/diffusers/compatibility.json`; why it is so: docs/decisions/0032-ticks-held-by-tests.md.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

from ditattn.backends.registry import BACKENDS
from ditattn.models import MODELS, ModelFamily

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "hosts" / "diffusers" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"

FEATURES = (
    "compiled",
    "references",
    "Ulysses",
    "ring",
    "CFG",
    "tensor",
    "step caches",
    "LoRA",
    "quantised weights",
    "offloading",
    "register",
)
"""Columns of the second table; those of the first are the backends."""

Record = Mapping[str, Mapping[str, tuple[str, str]]]
"""{column: {transformer class: (word of the cell, id of a test that shows it)}}."""


class Refused(Exception):
    """The results make no tables."""


def gathered(*results: Path) -> Record:
    """What the tests of JUnit files showed.

    Raises:
        Refused: a test failed, none showed anything, or two show different words of one cell.
    """
    cases = [case for one in results for case in ElementTree.parse(one).iter("testcase")]
    failed = [str(case.get("name")) for case in cases if case.find("failure") is not None or case.find("error") is not None]
    if failed:
        raise Refused(f"tests failed, so there is no record of them: {', '.join(failed[:5])}{', ...' if len(failed) > 5 else ''}")
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for column, cls, word, test in sorted(_cells(cases)):
        held = found.setdefault(column, {}).setdefault(cls, (word, test))
        if held[0] != word:
            raise Refused(f"{column} of {cls}: {held[1]} shows '{held[0]}', {test} shows '{word}'")
    if not found:
        raise Refused(f"no test of {', '.join(map(str, results))} is marked `shows`")
    return found


def _cells(cases: list[ElementTree.Element]) -> Iterator[tuple[str, str, str, str]]:
    """(column, class, word, test id)."""
    for case in cases:
        for one in case.iter("property"):
            if one.get("name") == "shows":
                told = json.loads(one.get("value", ""))
                yield from ((column, cls, word, told["test"]) for column, cls, word in told["cells"])


def read_record() -> Record:
    """What is kept."""
    return {column: {cls: (word, test) for cls, (word, test) in row.items()} for column, row in json.loads(RECORD.read_text()).items()}


def written(record: Record) -> str:
    """A line for each cell."""
    columns = []
    for column, row in sorted(record.items()):
        cells = ",\n".join(f"    {json.dumps(cls)}: {json.dumps(cell)}" for cls, cell in sorted(row.items()))
        columns.append(f"  {json.dumps(column)}: {{\n{cells}\n  }}")
    return "{\n" + ",\n".join(columns) + "\n}\n"


def with_tables(page: str, record: Record) -> str:
    """The page with the tables of a record between its markers."""
    unknown = sorted(record.keys() - {*BACKENDS, *FEATURES})
    if unknown:
        raise Refused(f"there is no column for {', '.join(unknown)}: add it to FEATURES")
    for marker, table in (("families", _of_backends(record)), ("features", _of_features(record))):
        found = re.findall(rf"<!-- {marker}: .*-->\n(?:\|.*\n)*", page)
        if len(found) != 1:
            raise Refused(f"the page must have one line '<!-- {marker}: ... -->', not {len(found)}")
        page = page.replace(found[0], found[0].partition("\n")[0] + "\n" + table)
    return page


def _of_backends(record: Record) -> str:
    rows = [["family", "diffusers class", *BACKENDS, "notes"]]
    for family in MODELS:
        classes = ", ".join(f"`{cls}`" for cls in family.transformer_classes)
        rows.append([family.name, classes, *(_cell(record, column, family) for column in BACKENDS), family.notes])
    return _table(rows)


def _of_features(record: Record) -> str:
    rows = [["family", *FEATURES]]
    rows += [[family.name, *(_cell(record, column, family) for column in FEATURES)] for family in MODELS]
    return _table(rows)


def _cell(record: Record, column: str, family: ModelFamily) -> str:
    """The word that all classes of a family have; else which class has which; nothing where no test shows any."""
    words = {cls: record[column][cls][0] for cls in family.transformer_classes if cls in record.get(column, {})}
    if len(words) == len(family.transformer_classes) and len(set(words.values())) == 1:
        return next(iter(words.values()))
    return ", ".join(f"`{cls}`: {word}" for cls, word in words.items())


def _table(rows: list[list[str]]) -> str:
    head, *others = rows
    lines = [_line(head), "|" + "---|" * len(head), *map(_line, others)]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def main(arguments: list[str]) -> None:
    if arguments:
        RECORD.write_text(written(gathered(*map(Path, arguments))))
    PAGE.write_text(with_tables(PAGE.read_text(), read_record()))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Refused as refused:
        sys.exit(str(refused))
