"""docs/architecture.md against the tree: the floors are the linter's, and every file and name on the page exists."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import check_imports  # noqa: E402

PACKAGE = ROOT / "src" / "ditattn"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
ADDING = ROOT / "docs" / "adding_a_backend.md"


def quoted(page: Path) -> list[str]:
    """What stands between single backticks, outside of code blocks."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def paths(page: Path) -> list[str]:
    """Quoted paths, with `::name` where a name in the file is meant; what is in angle brackets stands for many and is left out."""
    return [text for text in quoted(page) if re.fullmatch(r"[\w./]+(/|\.(py|cpp|h|toml|md))(::\w+)?", text)]


def place(path: str) -> Path:
    """From the root of the repository where it says so, else from the package."""
    top = path.partition("/")[0]
    return (ROOT if top in ("src", "tools", "tests", "docs", "pyproject.toml") else PACKAGE) / path


@pytest.mark.parametrize("text", dict.fromkeys(paths(ARCHITECTURE)))
def test_every_path_and_name_exists(text: str) -> None:
    path, _, name = text.partition("::")
    assert place(path).exists(), path
    if name:
        definition = rf"^\s*(async )?(def|class) {name}\b|^(EXPORT int|template <.*> class) {name}\b"
        assert re.search(definition, place(path).read_text(encoding="utf-8"), re.MULTILINE), f"{path} defines no {name}"


def test_the_walks_name_enough_to_be_followed() -> None:
    assert sum("::" in text for text in paths(ARCHITECTURE)) > 25


def test_the_floors_are_those_of_the_linter() -> None:
    table = re.findall(r"^\| (`.*?) \|", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE)
    rows = [[Path(name.rstrip("/")).stem for name in re.findall(r"`([^`]+)`", row)] for row in table]
    assert rows == [[room.removeprefix("ditattn.") for room in floor] for floor in check_imports.floors()]


def test_the_debts_are_those_of_the_contract() -> None:
    said = "`ignore_imports`" in ARCHITECTURE.read_text(encoding="utf-8")
    assert said is ("\nignore_imports" in (ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_optional_packages_stand_beside_their_floor() -> None:
    table = re.findall(r"^\| `(\w+)/` \|.*\| (.*?) ?\|$", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE)
    named = {folder: set(re.findall(r"\w+", cell)) for folder, cell in table}
    for package, places in check_imports.ONLY_IN.items():
        for module in places:
            assert package in named[module.split(".")[1]], (package, module)


@pytest.mark.parametrize("text", dict.fromkeys(text for text in paths(ADDING) if "my_package" not in text))
def test_paths_of_the_page_on_adding_things_exist(text: str) -> None:
    assert place(text).exists()
