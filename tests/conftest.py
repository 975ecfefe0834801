"""Every test starts from the same seed and thread count."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# OpenMP threads that spin while they wait slow each other down many times over where processes share cores; torch reads it at import
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# processes that run side by side share the cores: one thread each, in their children too
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# where torch_npu is installed, torch would load it at once; tests/npu first puts stand-ins in place of CANN
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

# what torch compiles is kept beside the checkout: code that another version of the package had compiled must not serve here
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "torchinductor"))

import torch
from hypothesis import settings

from garbage import collect_seldom

# the first example of a property often pays for imports; runs are made repeatable instead of timed
settings.register_profile("house", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("house")


def pytest_collection_finish() -> None:
    gc.collect()
    collect_seldom()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    if torch.accelerator.is_available():
        torch.manual_seed(0)
    else:
        # that would note the stack for every kind of device that may yet appear, a millisecond for each test
        torch.default_generator.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--implementation",
        metavar="ROW",
        action="append",
        help="leave out what tests an op's other implementations; may be repeated. make test-isa asks for those of the CPU kernels",
    )
    parser.addoption(
        "--emulated-tiles",
        action="store_true",
        help="the CPU kernels are those for AMX, with tiles emulated by AVX-512: tests/cpu_builds.py",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--emulated-tiles"):
        return
    import cpu_builds

    if problem := cpu_builds.cpu_library.problem():
        raise pytest.UsageError(f"--emulated-tiles: {problem}")
    if not cpu_builds.runs_here(cpu_builds.EMULATED):
        pytest.exit("emulated tiles need a CPU with AVX512_BF16: nothing was tested", returncode=0)
    # before test modules ask the ops' tables which implementations run here
    cpu_builds.load_emulated_tiles()


def pytest_report_header(config: pytest.Config) -> str | None:
    return "CPU kernels: amx with emulated tiles" if config.getoption("--emulated-tiles") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # files with slow tests first, each in one piece: a slow test at the end would leave the other processes idle
    with_slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in with_slow)
    wanted = config.getoption("--implementation")
    if wanted is None:
        return
    tested = {item: item.callspec.params["name"] for item in items if "name" in getattr(getattr(item, "callspec", None), "params", ())}
    # where one is not tested, as of a CPU that cannot run the kernels, nothing is left, and pytest fails
    kept = [item for item in items if tested.get(item, wanted[0]) in wanted] if {*wanted} <= {*tested.values()} else []
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept
