"""What the tests of diffusers pipelines share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import tiny_pipelines
from tiny_pipelines import TinyPipeline


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Matrices this small only lose by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def wan() -> TinyPipeline:
    return tiny_pipelines.wan()
