"""The pages of the site that are made from other files, and its menu; `make docs` judges the site itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import ditattn
from ditattn import errors
from ditattn.backends.dense import DENSE_BACKEND
from ditattn.backends.sparse import Reason
from ditattn.runtime.key_padding import MASK_WITH_GAPS, OTHER_MASK
from ditattn.runtime.self_attention import NOT_SELF_ATTENTION
from ditattn.runtime.serve import UNSAID

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import docs_pages  # noqa: E402


@pytest.mark.parametrize(
    ("page", "link", "turned"),
    [
        ("index.md", "(../CHANGELOG.md)", "(changelog.md)"),
        ("index.md", "(../examples/)", "(examples.md)"),
        ("backends/fa.md", "(../../CONTRIBUTING.md#a)", "(../contributing.md#a)"),
        ("quick_start.md", "(../examples/flux.py)", "(examples.md#flux)"),
        ("backends/fa.md", "(../ascend.md#b)", "(../ascend.md#b)"),
        ("index.md", "(https://example.org/CHANGELOG.md)", "(https://example.org/CHANGELOG.md)"),
    ],
)
def test_links_to_files_outside_of_docs_lead_to_their_pages(page: str, link: str, turned: str) -> None:
    assert docs_pages.in_site(f"see [this]{link}.", page) == f"see [this]{turned}."


def test_links_of_files_in_the_root_are_those_of_a_page() -> None:
    text = docs_pages.page_of("CONTRIBUTING.md")
    assert "](architecture.md)" in text
    assert "](docs/" not in text


def test_the_page_of_examples_has_every_program() -> None:
    text = docs_pages.page_of("examples")
    for path in (ROOT / "examples").glob("*.py"):
        assert f"## {path.stem}\n" in text
        assert path.read_text(encoding="utf-8") in text


def test_patterns_in_the_menu_become_pages() -> None:
    menu = docs_pages._expanded([{"Home": "index.md"}, {"Backends": ["backends/*.md"]}])
    assert menu[0] == {"Home": "index.md"}
    assert menu[1]["Backends"] == sorted(f"backends/{path.name}" for path in (ROOT / "docs" / "backends").glob("*.md"))


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    public = [f"ditattn.{name}" for name in ditattn.__all__ if name != "__version__" and not hasattr(errors, name)]
    public += [f"ditattn.{name}" if name in ditattn.__all__ else f"ditattn.errors.{name}" for name in errors.__all__]
    for name in public:
        assert f"\n::: {name}\n" in text, name


def test_every_error_is_explained() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for name in errors.__all__:
        assert f"| `{name}` |" in text or name == "DitattnError", name


def test_every_reason_of_a_dense_call_is_explained() -> None:
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    reasons = [reason for name, reason in vars(Reason).items() if name.isupper()]
    assert len(reasons) > 10
    for reason in (*reasons, MASK_WITH_GAPS, OTHER_MASK, NOT_SELF_ATTENTION, DENSE_BACKEND, UNSAID):
        assert f"`{reason}`" in text, reason
