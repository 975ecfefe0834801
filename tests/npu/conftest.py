"""The real torch_npu on a machine without an NPU. Run by `make test` in an environment of its own."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# test_environment.py says that the rest was left out, and why
collect_ignore = [path.name for path in HERE.glob("test_*.py") if path.name != "test_environment.py"]
if importlib.util.find_spec("torch_npu"):
    collect_ignore = []

if not collect_ignore:
    from npu import cann_stub

    _folder = tempfile.TemporaryDirectory(prefix="cann_stub_")
    cann_stub.build(Path(_folder.name))
    cann_stub.preload(Path(_folder.name))
    from npu import operators

    operators.declare()
    operators.give_cpu_kernels()
    # a refused call is what many tests want to see; torch prints a traceback for each
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)


@pytest.fixture(scope="session")
def stub_folder() -> Path:
    """Where the stand-ins lie, for tests that start another process."""
    return Path(_folder.name)


@pytest.fixture(autouse=True)
def _forgetful() -> Iterator[None]:
    """A table's choices are cached per call signature, and the machines of these tests change."""
    from ditattn.ops.block_estimate import serving
    from ditattn.ops.table import _warn_once, choose, choose_to_run

    caches = (choose, choose_to_run, serving, _warn_once)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def soc(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make this machine's NPU another one, by its name."""

    def become(name: str) -> None:
        monkeypatch.setenv(cann_stub.SOC_VARIABLE, name)

    return become
