"""The published vllm_omni with stand-ins for vLLM. Run by `make test-vllm-omni`, with vllm_omni in a folder of its own."""

from __future__ import annotations

import atexit
import importlib.util
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GROUP = "vllm_omni.general_plugins"
# test_environment.py says that the rest was left out, and why
collect_ignore = [path.name for path in HERE.glob("test_*.py") if path.name != "test_environment.py"]
if importlib.util.find_spec("vllm_omni"):
    collect_ignore = []

if not collect_ignore:
    from omni import vllm_stand_in

    vllm_stand_in.install()


@pytest.fixture
def load_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call vllm_omni's own loader, which finds the entry points of pyproject.toml; keyword arguments are environment variables."""
    from vllm_omni import plugins

    points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"][GROUP]
    info = tmp_path / "ditattn-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ditattn\nVersion: 0\n", encoding="utf-8")
    lines = [f"[{GROUP}]", *(f"{name} = {target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def load(**environment: str) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(plugins, "omni_plugins_loaded", False)
        plugins.load_omni_general_plugins()

    return load


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment asks for nothing, nothing is registered, and no run has begun."""
    from vllm_omni.diffusion.attention import selector
    from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum

    from ditattn.hosts.vllm_omni import classes
    from ditattn.hosts.vllm_omni.environment import KEYS, SWITCH
    from ditattn.hosts.vllm_omni.run import run_of_process

    for name in (SWITCH, KEYS):
        monkeypatch.delenv(name, raising=False)
    for cached in (classes.host_backend, classes._host_impl, classes._host_dense, classes._warn_unused, selector._cached_get_backend_cls):
        cached.cache_clear()
    run_of_process.cache_clear()
    yield
    atexit.unregister(run_of_process().finish)
    DiffusionAttentionBackendEnum.RAINFUSION_ATTN.clear_override()


@pytest.fixture
def configured() -> Callable[..., Any]:
    """A context in which models are built: vllm_omni's own attention config, and what its layers read of the rest."""
    from vllm_omni.diffusion import config, data

    @contextmanager
    def build(attention: Any, **parallel: int) -> Iterator[Any]:
        degrees = {"ring_degree": 1, "allgather_degree": 1, "ulysses_degree": 1, "sequence_parallel_size": 1, **parallel}
        made = SimpleNamespace(
            diffusion_attention_config=data.build_attention_config(attention),
            parallel_config=SimpleNamespace(**degrees),
            model_class_name=None,
        )
        with config.set_current_diffusion_config(made):
            yield made

    return build
