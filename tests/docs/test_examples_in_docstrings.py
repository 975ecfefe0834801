"""Every public function and class has an example in its docstring; it runs and prints what it says."""

from __future__ import annotations

import ast
import doctest
import inspect
from pathlib import Path

import pytest

import ditattn
from ditattn.backends import registry
from hub_stand_ins import hub_stand_ins as hub_stand_ins

PUBLIC = [name for name in ditattn.__all__ if name != "__version__"]


def docstring_of(name: str) -> str:
    """As the reference shows it; that of the enumeration stands behind its assignment."""
    if name != "AttentionBackendEnum":
        return inspect.cleandoc(getattr(ditattn, name).__doc__)
    statements = ast.parse(Path(registry.__file__).read_text(encoding="utf-8")).body
    place = next(n for n, line in enumerate(statements) if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == name)
    return inspect.cleandoc(ast.literal_eval(statements[place + 1].value))  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.usefixtures("hub_stand_ins")
def test_example_runs(name: str) -> None:
    text = docstring_of(name)
    assert "\nExamples:\n" in text
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    assert any(name in example.source for example in test.examples)
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert result.attempted == len(test.examples)
    assert result.failed == 0, "".join(said)
