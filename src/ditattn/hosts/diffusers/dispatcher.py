"""Entries in diffusers' attention dispatcher.

diffusers has no public way to add a backend, so this file writes the dispatcher's private tables, and is the only one that knows them.
tests/hosts/diffusers/test_dispatcher.py pins every name used here.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

from diffusers.models import attention_dispatch
from torch import Tensor

from ditattn.hosts.diffusers.parallel import attend_in_parallel
from ditattn.runtime.attend import attend

__all__ = ["add_private_backend", "add_public_backend", "dispatched_attention", "process_wide_backend"]

_serial = itertools.count(1)


def dispatched_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """What the dispatcher calls. Every parameter is listed, since the dispatcher drops those that are not.

    `enable_gqa` needs no action: key and value may always have fewer heads here.
    """
    if _parallel_config is not None:
        return attend_in_parallel(query, key, value, attn_mask, dropout_p, is_causal, scale, _parallel_config)
    return attend(query, key, value, attn_mask, dropout_p, is_causal, scale)


def _new_member(name: str) -> Any:
    """A member of diffusers' Enum that its maps do not know: valid wherever a member is, invisible to everybody else."""
    enum_cls = attention_dispatch.AttentionBackendName
    member = str.__new__(enum_cls, name)
    member._name_, member._value_ = name.upper(), name
    return member


def _add_function(member: Any, function: Callable[..., Tensor]) -> Callable[[], None]:
    registry = attention_dispatch._AttentionBackendRegistry
    registry._backends[member] = function
    registry._constraints[member] = []
    registry._supported_arg_names[member] = set(inspect.signature(function).parameters)
    registry._supports_context_parallel.add(member.value)

    def remove() -> None:
        registry._supports_context_parallel.discard(member.value)
        for table in (registry._backends, registry._constraints, registry._supported_arg_names):
            table.pop(member, None)

    return remove


def add_private_backend(name: str) -> tuple[Any, Callable[[], None]]:
    """An entry for one installation: only processors that hold the returned member reach it. Returns the member and its removal."""
    member = _new_member(f"ditattn_{name}_{next(_serial)}")
    return member, _add_function(member, dispatched_attention)


def process_wide_backend() -> str:
    """What diffusers runs where a processor has chosen nothing."""
    return str(attention_dispatch._AttentionBackendRegistry._active_backend.value)


def add_public_backend(name: str) -> Callable[[], None]:
    """Make `name` selectable wherever diffusers takes a backend name. Returns the removal."""
    enum_cls = attention_dispatch.AttentionBackendName
    registry = attention_dispatch._AttentionBackendRegistry
    active = registry._active_backend
    member = _new_member(name)
    type.__setattr__(enum_cls, member._name_, member)
    enum_cls._member_map_[member._name_] = member
    enum_cls._member_names_.append(member._name_)
    enum_cls._value2member_map_[name] = member
    remove_function = _add_function(member, dispatched_attention)

    def remove() -> None:
        if registry._active_backend == member:
            # set_attention_backend() also sets the process-wide backend, and its reset does not undo that
            registry._active_backend = active
        remove_function()
        enum_cls._value2member_map_.pop(name, None)
        enum_cls._member_names_.remove(member._name_)
        enum_cls._member_map_.pop(member._name_, None)
        type.__delattr__(enum_cls, member._name_)

    return remove
