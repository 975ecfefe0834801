"""Stand-ins for vLLM, so that vllm_omni's attention modules can be imported where vLLM cannot: one finder, and what they really use.

vLLM's wheel is for CUDA and 315 MB large. What vllm_omni takes from it here are a logger, a resolver of dotted names, the variable
VLLM_PLUGINS, and names of classes in annotations and bases: every other attribute of a stand-in is an empty class, made when asked for.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import types
from typing import Any

import torch


class _EmptyClass(type):
    """Its attributes are empty classes too. Called with one function, as a decorator, it gives it back."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _EmptyClass(name, (), {})
        setattr(cls, name, made)
        return made

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and (isinstance(args[0], type) or callable(args[0])):
            return args[0]
        return super().__call__()


class _Module(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _EmptyClass(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "vllm" else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        for name, value in REAL.get(module.__name__, {}).items():
            setattr(module, name, value)


class _Logger(logging.LoggerAdapter[logging.Logger]):
    """vLLM's loggers say some things once; how often does not matter here."""

    def info_once(self, message: str, *args: Any) -> None:
        self.info(message, *args)

    def warning_once(self, message: str, *args: Any) -> None:
        self.warning(message, *args)


def _resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


REAL: dict[str, dict[str, Any]] = {
    "vllm.logger": {"init_logger": lambda name: _Logger(logging.getLogger(name), {})},
    "vllm.utils.import_utils": {"resolve_obj_by_qualname": _resolve},
    "vllm.envs": {"VLLM_PLUGINS": None},
    "vllm.model_executor.layers.quantization": {"QUANTIZATION_METHODS": []},
}


def install() -> None:
    """Make `vllm` importable, and `vllm_omni` without its `__init__`, which patches vLLM's own classes."""
    sys.meta_path.insert(0, _Finder())
    spec = importlib.util.find_spec("vllm_omni")
    assert spec is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["vllm_omni"] = package
    from vllm_omni import platforms

    platforms._current_omni_platform = make_platform()


def make_platform() -> Any:
    """A platform of vllm_omni's own class that calls itself cuda and computes on the CPU: there is none of its own for CPUs."""
    from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum
    from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum

    class CpuStandIn(OmniPlatform):
        _omni_enum = OmniPlatformEnum.CUDA
        device_type = "cpu"
        device_name = "cuda"

        @classmethod
        def get_diffusion_attn_backend_cls(cls, selected_backend: str | None, head_size: int, allow_trtllm_default: bool = True) -> str:
            name = (selected_backend or "TORCH_SDPA").upper()
            if selected_backend is not None:
                cls.validate_diffusion_attn_backend(name)
            return DiffusionAttentionBackendEnum[name].get_path()

        @classmethod
        def get_device_count(cls) -> int:
            return 0

        @classmethod
        def get_torch_device(cls, local_rank: int | None = None) -> torch.device:
            return torch.device("cpu")

    return CpuStandIn()
