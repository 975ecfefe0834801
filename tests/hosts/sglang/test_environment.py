"""Whether the tests of this folder run, and against what."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest


def test_against_the_released_package() -> None:
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("sglang is not installed here: make test-sglang runs tests/hosts/sglang in .venv-sglang")
    assert importlib.metadata.version("sglang") == "0.5.23"
