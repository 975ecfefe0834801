"""Everything that an installation may touch, as a value that two points in time can be compared by."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn

HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def footprint(pipe: Any) -> dict[str, Any]:
    """Of every module of a pipeline, and of diffusers' dispatcher. Objects are compared by identity."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    modules = {f"{name}.{path}": _of_module(module) for name, part in parts.items() for path, module in part.named_modules()}
    return {**modules, "dispatcher": dispatcher_footprint()}


def dispatcher_footprint() -> dict[str, Any]:
    """diffusers' Enum, its registry and its process-wide backend."""
    registry, enum_cls = _AttentionBackendRegistry, AttentionBackendName
    return {
        "functions": {str(name): id(function) for name, function in registry._backends.items()},
        "constraints": {str(name): list(map(id, rules)) for name, rules in registry._constraints.items()},
        "arguments": {str(name): set(names) for name, names in registry._supported_arg_names.items()},
        "parallel": set(registry._supports_context_parallel),
        "active": id(registry._active_backend),
        "names": list(enum_cls._member_names_),
        "members": {name: id(member) for name, member in enum_cls._member_map_.items()},
        "values": {value: id(member) for value, member in enum_cls._value2member_map_.items()},
        "attributes": sorted(vars(enum_cls)),
    }


def _of_module(module: nn.Module) -> dict[str, Any]:
    processor = getattr(module, "processor", None)
    return {
        "attributes": sorted(vars(module)),
        "forward": id(vars(module).get("forward")),
        "processor": id(processor),
        "processor attributes": None
        if processor is None
        else {name: id(value) for name, value in getattr(processor, "__dict__", {}).items()},
        "hooks": {name: [id(hook) for hook in getattr(module, name).values()] for name in HOOK_TABLES},
    }
