"""Copies and pickles of a served model are plain models: usable, installable, and no part of the original's report."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from ditattn.hosts.diffusers.hooks import HOOK_NAME

__all__ = ["copies_are_plain"]

_PACKAGE = __name__.partition(".")[0] + "."
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_FLAGS_OF_HOOKS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def copies_are_plain(module: nn.Module, plain_processor: Callable[[], Any] | None = None) -> Callable[[], None]:
    """Let `copy.deepcopy`, `copy.copy` and pickling see `module` without what an installation put there. Returns the removal.

    Python asks the object itself for its state, so one attribute of the instance is enough, and no class is patched.

    Args:
        plain_processor: makes the attention processor that the copy gets; None leaves it.
    """

    def state() -> dict[str, Any]:
        found = {name: value for name, value in vars(module).items() if name != "__getstate__"}
        if getattr(found.get("forward"), "ditattn_redirects", False):
            del found["forward"]
        _drop_hooks(found)
        _drop_listener(found)
        if plain_processor is not None and "processor" in found:
            found["processor"] = plain_processor()
        elif plain_processor is not None:
            # a processor with weights of its own is a submodule
            found["_modules"] = {**found["_modules"], "processor": plain_processor()}
        return found

    vars(module)["__getstate__"] = state

    def remove() -> None:
        vars(module).pop("__getstate__", None)

    return remove


def _drop_hooks(state: dict[str, Any]) -> None:
    """Torch's hooks on the module that this package registered."""
    ours = {number for name in _HOOKS for number, hook in state[name].items() if str(getattr(hook, "__module__", "")).startswith(_PACKAGE)}
    for name in (*_HOOKS, *_FLAGS_OF_HOOKS):
        table = state[name]
        state[name] = type(table)((number, value) for number, value in table.items() if number not in ours)


def _drop_listener(state: dict[str, Any]) -> None:
    """Our entry in diffusers' own registry of hooks; the registry goes too where nothing else is in it."""
    registry = state.get("_diffusers_hook")
    if registry is None or HOOK_NAME not in registry.hooks:
        return
    if len(registry.hooks) == 1:
        del state["_diffusers_hook"]
        return
    twin = copy.copy(registry)
    place = registry._hook_order.index(HOOK_NAME)
    twin.hooks = {name: hook for name, hook in registry.hooks.items() if name != HOOK_NAME}
    twin._hook_order = [name for name in registry._hook_order if name != HOOK_NAME]
    twin._fn_refs = [reference for number, reference in enumerate(registry._fn_refs) if number != place]
    state["_diffusers_hook"] = twin
