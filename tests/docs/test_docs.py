"""The documentation against the code: tables, pages, links, picture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ditattn
from ditattn.backends.registry import BACKENDS, RECOMMENDED_BACKEND, load_backend
from ditattn.devices import find_device
from ditattn.devices.npu import Npu
from ditattn.models import MODELS, NOT_SERVED
from ditattn.models.not_served import NOT_DESCRIBED
from ditattn.ops import block_sparse_attention, dense_attention, mx_linear
from ditattn.packages import TORCH_NPU

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rows(text: str, marker: str | None = None) -> list[list[str]]:
    """Cells of the first table after `marker`, without heading and rule."""
    text = text[text.index(marker) :] if marker else text
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_has_a_page_with_its_keys_and_defaults(backend: str) -> None:
    text = (ROOT / "docs" / "backends" / f"{backend}.md").read_text()
    assert text.startswith(f"# {backend}\n")
    fields = load_backend(backend).get_config_cls().model_fields
    if not fields:
        assert re.search(r"configuration keys(: none| \| none)", text, re.IGNORECASE)
        return
    documented = {cells[0].strip("`"): cells[2] for cells in rows(text, "## Configuration")}
    assert list(documented) == list(fields)
    for name, field in fields.items():
        assert documented[name] == {"": "(none)", "()": "(none)", "True": "true", "False": "false"}.get(
            str(field.default), str(field.default)
        ), name


def test_every_model_family_is_in_the_matrix() -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text()
    table = rows(text, "<!-- families")
    assert f"| {' | '.join(BACKENDS)} | notes |" in text
    assert [cells[0] for cells in table] == [family.name for family in MODELS]
    for cells, family in zip(table, MODELS, strict=True):
        assert [name.strip("`") for name in cells[1].split(", ")] == list(family.transformer_classes)
        for backend, word in zip(BACKENDS, cells[2:-1], strict=True):
            # test_compatibility.py holds the words
            assert family.supported is None or backend in family.supported or word.startswith("no: ")


def test_the_readme_counts_the_families() -> None:
    """`test_every_family_is_run_here` runs each of them, `test_every_transformer.py` walks the classes."""
    told = re.search(r"^(\d+) families, (\d+) of the (\d+) transformer classes", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert told is not None
    served = [name for family in MODELS for name in family.transformer_classes]
    assert tuple(map(int, told.groups())) == (len(MODELS), len(served), len(served) + len(NOT_SERVED))


def test_every_reason_against_a_model_is_in_its_table() -> None:
    table = rows((ROOT / "docs" / "compatibility.md").read_text(), "<!-- not served")
    told = {name.strip("`"): reason for names, reason in table for name in names.split(", ")}
    assert told == {name: reason for name, reason in NOT_SERVED.items() if reason != NOT_DESCRIBED}


def test_device_table() -> None:
    table = rows((ROOT / "docs" / "compatibility.md").read_text(), "<!-- devices")
    assert [cells[0] for cells in table] == list(BACKENDS)
    readme = rows((ROOT / "README.md").read_text(), "## Devices and backends")
    for backend, cells, short in zip(BACKENDS, table, readme, strict=True):
        assert (cells[1] == "yes") is (load_backend(backend).why_not(find_device("cpu")) is None)
        needs = [package.module for package in (*Npu.packages, *load_backend(backend).packages.get("npu", ()))]
        any_of = [package.module for package in load_backend(backend).any_of.get("npu", ())]
        assert cells[3] == f"needs {', '.join(needs)}" + (f" and one of {', '.join(any_of)}" if any_of else "")
        assert TORCH_NPU.module in needs
        assert (cells[4] == "no") is ("no FlashAttention" in (load_backend(backend).why_not(find_device("meta")) or ""))
        assert short[2:5] == cells[1:4]
        assert short[0].startswith(f"[`{backend}`]")
        kind = "sparse" if load_backend(backend).is_sparse else "dense"
        assert short[1] == (f"{kind}, **recommended**" if backend == RECOMMENDED_BACKEND else kind)


HOST_PAGES = sorted((ROOT / "docs" / "hosts").glob("*.md"))


def test_the_table_of_hosts_has_a_column_for_each_that_says_what_ran() -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text()
    heading = re.search(r"^\| \|(.*)\|$", text[text.index("<!-- hosts") :], re.MULTILINE)
    assert heading is not None
    linked = re.findall(r"\]\((hosts/\w+\.md)\)", heading[1])
    assert sorted(linked) == [str(page.relative_to(ROOT / "docs")) for page in HOST_PAGES]
    release, *table = rows(text, "<!-- hosts")
    assert release[0] == "release"
    assert all(len(cells) == len(release) == 2 + len(linked) for cells in table)
    for what, *cells in table:
        for cell in cells:
            assert re.match(r"(run|contract only|not)(:|,|$)", cell), (what, cell)


def test_the_table_of_hosts_names_the_releases_that_the_tests_run() -> None:
    told = rows((ROOT / "docs" / "compatibility.md").read_text(), "<!-- hosts")[0][1:4]
    names = {"diffusers": "constraints.txt", "sglang": "constraints-sglang.txt", "vllm-omni": "constraints-vllm-omni.txt"}
    pinned = [re.search(rf"^{name}==(\S+)$", (ROOT / file).read_text(), re.MULTILINE) for name, file in names.items()]
    assert told == [found and found[1] for found in pinned]


@pytest.mark.parametrize("page", HOST_PAGES, ids=lambda page: page.stem)
def test_pages_of_hosts_start_with_the_commands_that_a_user_types(page: Path) -> None:
    """Installing, and the host's own command or the copy that it loads; what is explained comes after."""
    text = page.read_text()
    start = text[: text.index("\n## ")]
    first = [block.strip().splitlines() for block in re.findall(r"^```\n(.*?)^```$", start, re.MULTILINE | re.DOTALL)]
    commands = [line for block in first for line in block]
    assert commands[0].startswith("pip install .")
    assert len(commands) == 2
    prose = [line for line in text.partition("```")[0].splitlines() if line and not line.startswith(("# ", "<!--"))]
    assert len(prose) <= 1


def test_names_in_the_guide_exist() -> None:
    text = (ROOT / "docs" / "guide.md").read_text() + (ROOT / "README.md").read_text()
    for name in re.findall(r"ditattn\.([A-Za-z_]+)", text):
        assert hasattr(ditattn, name), name


def test_tests_named_in_originals_exist() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", (ROOT / "docs" / "originals.md").read_text()):
        assert f"def {name}(" in sources, name
    for name in re.findall(r"`(test_\w+\.py)`", (ROOT / "docs" / "originals.md").read_text()):
        assert list((ROOT / "tests").rglob(name)), name


def test_the_picture_is_what_the_code_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import draw_idea

    monkeypatch.setattr(draw_idea, "TARGET", tmp_path / "idea.svg")
    draw_idea.main()
    assert (tmp_path / "idea.svg").read_text() == (ROOT / "docs" / "images" / "idea.svg").read_text()


def test_version_is_in_the_changelog() -> None:
    assert f"## {ditattn.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {ditattn.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_ascend_page_names_every_implementation() -> None:
    text = (ROOT / "docs" / "ascend.md").read_text()
    for table in (block_sparse_attention.TABLE, dense_attention.TABLE, mx_linear.TABLE):
        for row in table:
            if row.devices == ("npu",):
                assert f"`{row.name}`" in text, row.name
