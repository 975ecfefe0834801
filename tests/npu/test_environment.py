"""Whether the tests of this folder run, and against what."""

from __future__ import annotations

import importlib.util

import pytest


def test_against_the_installed_packages() -> None:
    if importlib.util.find_spec("torch_npu") is None:
        pytest.skip("torch_npu is not installed here: make test runs tests/npu in .venv-npu")
    import torch

    assert torch.npu.is_available()
    assert torch.npu.get_device_name(0).startswith("Ascend")
