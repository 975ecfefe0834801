"""Prints what tests are collected that hold cells of docs/compatibility.md: JSON {test id: [its columns, is it skipped]}."""

from __future__ import annotations

import json

import pytest


class Collected:
    """Of all tests marked `shows`."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[list[str], bool]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            columns = [marker.args[0] for marker in item.iter_markers("shows")]
            if columns:
                conditions = [condition for marker in item.iter_markers("skipif") for condition in marker.args]
                self.found[item.nodeid] = columns, any(conditions) or item.get_closest_marker("skip") is not None


def main(arguments: list[str]) -> int:
    """Takes the folder of the tests; returns the exit status."""
    collected = Collected()
    code = pytest.main(["--collect-only", "-qq", "--no-summary", "-p", "no:cacheprovider", *arguments], plugins=[collected])
    # what pytest prints comes first
    print(json.dumps(collected.found))
    return int(code)
