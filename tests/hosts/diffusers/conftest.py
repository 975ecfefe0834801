"""What the tests of diffusers pipelines share."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator

import pytest
import torch

import tiny_pipelines
from shown import check, shown, watching
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A test marked `shows` tells JUnit which cells of docs/compatibility.md it holds."""
    if item.get_closest_marker("shows") is None:
        return (yield)
    with watching() as reports:
        result = yield
    cells = shown(item, reports)
    listed = [[column, cls, word] for (column, cls), word in cells.items()]
    item.user_properties.append(("shows", json.dumps({"test": item.nodeid, "cells": listed})))
    check(item, cells)
    return result
