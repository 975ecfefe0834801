"""Every test starts from the same seed and thread count."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# OpenMP threads that spin while they wait slow each other down many times over where processes share the cores; torch reads it when imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# the first example of a property often pays for imports; runs are made repeatable instead of timed
settings.register_profile("house", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
