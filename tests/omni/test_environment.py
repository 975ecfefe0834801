"""Whether the rest of this folder runs."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

import pytest


@pytest.mark.skipif(importlib.util.find_spec("vllm_omni") is None, reason="vllm_omni is not installed here; make test-vllm-omni runs this")
def test_it_is_the_release_that_the_adapter_was_written_for() -> None:
    assert version("vllm-omni") == "0.30.0"
