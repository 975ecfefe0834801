"""ComfyUI's own samplers, model patcher and model classes, where a checkout of ComfyUI is: COMFYUI_PATH=/path/to/ComfyUI.

ComfyUI is on no package index, so `make test` leaves this out. Packages that ComfyUI imports for other models and that are missing are
replaced by empty modules; `pip install einops torchsde scipy aiohttp av` brings what it really needs here.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = os.environ.get("COMFYUI_PATH")
# test_environment.py says that the rest was left out, and why
collect_ignore = [] if ROOT else [path.name for path in HERE.glob("test_*.py") if path.name != "test_environment.py"]


class _Empty(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _prepare(root: str) -> None:
    sys.path.insert(0, root)
    for name in (
        "torchaudio",
        "torchaudio.functional",
        "torchaudio.transforms",
        "torchvision",
        "torchvision.transforms",
        "kornia",
        "spandrel",
    ):
        if importlib.util.find_spec(name.partition(".")[0]) is None or name.partition(".")[0] in sys.modules:
            module = _Empty(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = module
    before, sys.argv = sys.argv, ["comfyui", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    sys.argv = before


if ROOT:
    _prepare(ROOT)


@pytest.fixture(scope="session")
def nodes() -> Any:
    """The node pack, imported as ComfyUI does it: from its folder, by no name of ours."""
    folder = Path(__file__).resolve().parents[2] / "comfyui"
    spec = importlib.util.spec_from_file_location(
        "custom_node_of_ditattn", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
