"""The released sglang on a machine without a GPU. Run by `make test-sglang` in an environment of its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# test_environment.py says that the rest was left out, and why
collect_ignore = [path.name for path in HERE.glob("test_*.py") if path.name != "test_environment.py"]
if importlib.util.find_spec("sglang"):
    collect_ignore = []
    from hosts.sglang import vision_operators

    vision_operators.declare()


@pytest.fixture(scope="session")
def plugged() -> None:
    """sglang finds the plug-in by its entry point and applies its hooks, as its worker does."""
    from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks, load_plugins

    load_plugins()
    apply_plugin_hooks()


@pytest.fixture
def serve(plugged: None) -> Iterator[Callable[..., Any]]:
    """Set sglang's arguments of the server as a command line would; what was served before is forgotten."""
    from hosts.sglang import server

    with server.single_process():
        yield server.serve
        server.forget()
