"""Every name of diffusers that is not public and that the sources use: that the list is whole, and that the installed release has each."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
from torch import nn

import ditattn

SOURCES = Path(ditattn.__file__).parent

DISPATCH = "diffusers.models.attention_dispatch"
REGISTRY = f"{DISPATCH}._AttentionBackendRegistry"
NAMES = f"{DISPATCH}.AttentionBackendName"


def at(path: str) -> Any:
    """The object that a dotted path names."""
    module, _, name = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ImportError:
        return getattr(at(module), name)


def has(path: str) -> Callable[[str], bool]:
    return lambda name: hasattr(at(path), name)


def is_a_submodule(of: str) -> Callable[[str], bool]:
    return lambda name: importlib.import_module(f"{of}.{name}") is not None


def registry_of_a_module(name: str) -> bool:
    from diffusers.hooks import HookRegistry

    module = nn.Linear(1, 1)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    return module._diffusers_hook is registry if name == "_diffusers_hook" else isinstance(getattr(registry, name), list)


def on_every_dispatching_processor(name: str) -> bool:
    """The models that the first version served; tests/hosts/diffusers/test_families.py runs them all."""
    from diffusers.models.transformers import transformer_flux, transformer_wan

    return all(hasattr(cls, name) for cls in (transformer_wan.WanAttnProcessor, transformer_flux.FluxAttnProcessor))


def is_set_by(method: str) -> Callable[[str], bool]:
    """An attribute that exists once a public method was called, which needs several processes."""
    return lambda name: name in inspect.getsource(at(method))


PRIVATE: dict[str, Callable[[str], bool]] = {
    # the dispatcher
    "_AttentionBackendRegistry": has(DISPATCH),
    "_active_backend": has(REGISTRY),
    "_backends": has(REGISTRY),
    "_constraints": has(REGISTRY),
    "_supported_arg_names": has(REGISTRY),
    "_supports_context_parallel": has(REGISTRY),
    "_templated_context_parallel_attention": has(DISPATCH),
    "_attention_backend": on_every_dispatching_processor,
    # hooks
    "_diffusers_hook": registry_of_a_module,
    "_fn_refs": registry_of_a_module,
    "_hook_order": registry_of_a_module,
    "_is_stateful": has("diffusers.hooks.ModelHook"),
    # context parallelism
    "_modeling_parallel": is_a_submodule("diffusers.models"),
    "_flattened_mesh": has("diffusers.ContextParallelConfig"),
    "_ring_local_rank": has("diffusers.ContextParallelConfig"),
    "_ring_mesh": has("diffusers.ContextParallelConfig"),
    "_ulysses_local_rank": has("diffusers.ContextParallelConfig"),
    "_ulysses_mesh": has("diffusers.ContextParallelConfig"),
    "_cp_plan": has("diffusers.WanTransformer3DModel"),
    "_parallel_config": on_every_dispatching_processor,
    # schedulers, and what files of configurations say of a class
    "_step_index": lambda name: hasattr(diffusers.FlowMatchEulerDiscreteScheduler(), name),
    "_class_name": lambda name: f'"{name}"' in diffusers.FlowMatchEulerDiscreteScheduler().to_json_string(),
}
"""Names with an underscore, and how to see that diffusers has them."""

ELSEWHERE = {
    "Python's Enum": {"_member_map_", "_member_names_", "_name_", "_value2member_map_", "_value_"},
    "Python": {"_Hash", "_asdict", "_getframe", "_replace"},
    "torch": {
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks",
        "_forward_hooks_always_called",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_modules",
        "_orig_mod",
        "_schema",
    },
    "accelerate": {"_hf_hook"},
    "ends of file names in tables of models": {"_diffusion_forcing", "_diffusion_forcing_i2v", "_diffusion_forcing_v2v", "_i2v"},
}
"""Underscored names of others."""

UNDOCUMENTED = {
    "diffusers.hooks": {"HookRegistry", "ModelHook"},
    "diffusers.hooks.context_parallel": {"ContextParallelSplitHook", "EquipartitionSharder"},
    "diffusers.hooks.hooks": {"BaseState", "HookFunctionReference", "StateManager"},
    "diffusers.models": {"attention_dispatch"},
    "diffusers.models._modeling_parallel": {"ContextParallelInput", "ContextParallelOutput", "gather_size_by_comm"},
    "diffusers.models.modeling_outputs": {"Transformer2DModelOutput"},
}
"""What is imported from inside diffusers: no underscore in most of their names, and no documentation of them either."""


def trees() -> Iterator[ast.Module]:
    """All sources but the adapters of other hosts, which have private names of their own."""
    others = [path for path in (SOURCES / "hosts").iterdir() if path.name not in ("diffusers", "__init__.py")]
    for path in sorted(SOURCES.rglob("*.py")):
        if any(path.is_relative_to(other) for other in others):
            continue
        yield ast.parse(path.read_text(encoding="utf-8"))


def underscored(name: str) -> bool:
    return re.fullmatch(r"_(?!_)\w*[a-z]\w*", name) is not None


def attributes_used() -> set[str]:
    """Underscored attributes, and texts that name one."""
    used = set()
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and underscored(node.attr):
                used.add(node.attr)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and underscored(node.value):
                used.add(node.value)
            if isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") == "ModelHook" for base in node.bases):
                used |= {
                    target.id for one in node.body if isinstance(one, ast.Assign) for target in one.targets if isinstance(target, ast.Name)
                }
    return used


def names_of_our_own() -> set[str]:
    """What the sources themselves define: functions, classes, methods, fields with a factory, and attributes of `self`."""
    defined = set()
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call):
                defined.add(node.target.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") == "self":
                defined.add(node.attr)
    return defined


def imports() -> dict[str, set[str]]:
    """What the sources import from modules inside diffusers."""
    found: dict[str, set[str]] = {}
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusers."):
                found.setdefault(str(node.module), set()).update(alias.name for alias in node.names)
    return found


def test_the_list_of_private_names_is_whole() -> None:
    parts = {part for module in imports() for part in module.split(".") if underscored(part)}
    used, known = attributes_used() | parts, set(PRIVATE).union(*ELSEWHERE.values())
    # a class of our own may name one too
    assert used - names_of_our_own() - known == set(), "names that the list lacks"
    assert known - used == set(), "names that nothing uses any more"


def test_the_list_of_imports_is_whole() -> None:
    assert imports() == UNDOCUMENTED


@pytest.mark.parametrize("name", PRIVATE)
def test_the_installed_diffusers_has_the_private_name(name: str) -> None:
    assert PRIVATE[name](name), f"diffusers {diffusers.__version__} has no {name} where ditattn looks for it"


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in UNDOCUMENTED.items() for name in sorted(names)])
def test_the_installed_diffusers_has_what_is_imported(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name), f"diffusers {diffusers.__version__} has no {module}.{name}"
