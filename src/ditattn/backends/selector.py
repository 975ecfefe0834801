"""Which backend serves a component: names by priority, then what the device can run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from ditattn.backends.base import AttentionBackend, check_head_size
from ditattn.backends.registry import DEFAULT_BACKEND, backend_names, load_backend, parse_backend_name
from ditattn.devices import Device, find_device
from ditattn.errors import BackendUnavailable, UnknownBackend, UnsupportedModel

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "Selection",
    "backend_on",
    "force_attn_backend",
    "get_attn_backend",
    "select_backend",
    "unnamed_backend",
]

ENVIRONMENT_VARIABLE = "DITATTN_ATTENTION_BACKEND"

_forced: ContextVar[str | None] = ContextVar("ditattn_forced_backend", default=None)


@dataclass(frozen=True)
class Selection:
    """A choice and its reason.

    Attributes:
        backend: the chosen backend; None means automatic.
        reason: which rule chose it.
    """

    backend: str | None
    reason: str


@contextlib.contextmanager
def force_attn_backend(backend: str | None) -> Iterator[None]:
    """Every selection inside the block takes `backend`, whatever else is asked; None lifts an outer force.

    Examples:
        >>> import ditattn, torch
        >>> with ditattn.force_attn_backend("torch_sdpa"):
        ...     ditattn.get_attn_backend(64, torch.float32, pipeline_backend="rain_fusion_attn").name
        'torch_sdpa'
    """
    token = _forced.set(None if backend is None else parse_backend_name(backend))
    try:
        yield
    finally:
        _forced.reset(token)


def select_backend(
    *,
    component: str | None = None,
    component_backends: Mapping[str, str] | None = None,
    pipeline_backend: str | None = None,
    forced: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Selection:
    """The first name that is set: forced > the component's own > the pipeline's > environment > automatic. Pure.

    Raises:
        UnknownBackend: the name that counts is no backend.
    """
    named = {
        "forced in a context manager": forced,
        f"named for component '{component}'": (component_backends or {}).get(component or ""),
        "named for the pipeline": pipeline_backend,
        f"from {ENVIRONMENT_VARIABLE}": (environment or {}).get(ENVIRONMENT_VARIABLE) or None,
    }
    for reason, name in named.items():
        if name is not None:
            return Selection(parse_backend_name(name), reason)
    return Selection(None, "automatic: the exact backend that runs on every device")


def unnamed_backend() -> str:
    """What serves where nobody names a backend: the forced one, that of the environment, or the default.

    Raises:
        UnknownBackend: the environment names no backend.
    """
    try:
        return select_backend(forced=_forced.get(), environment=os.environ).backend or DEFAULT_BACKEND
    except UnknownBackend as error:
        raise UnknownBackend(f"{ENVIRONMENT_VARIABLE}: {error}") from None


def backend_on(device: Device, name: str | None, head_size: int, dtype: torch.dtype) -> type[AttentionBackend]:
    """The backend class that serves a request on a device.

    Args:
        device: facts about the device.
        name: a backend's name; None takes the default, which is exact and runs everywhere.
        head_size: D.
        dtype: of query, key and value.

    Raises:
        UnknownBackend: no backend of that name.
        UnsupportedHeadSize: the backend does not support `head_size`; says which it does.
        BackendUnavailable: something is missing on this machine; says what, what it gives and what installs it.
    """
    if name is None:
        return load_backend(DEFAULT_BACKEND)
    backend = load_backend(name)
    check_head_size(backend.name, head_size, backend.head_sizes)
    reason = backend.why_not(device, head_size, dtype)
    if reason is not None:
        possible = [other for other in backend_names() if _can_run(other, device, head_size, dtype)]
        asked = f"attention backend '{backend.name}' was asked for on {device.device_type}"
        raise BackendUnavailable(f"{asked}: {reason}. Possible there: {', '.join(possible) or 'none'}")
    return backend


def _can_run(name: str, device: Device, head_size: int, dtype: torch.dtype) -> bool:
    try:
        return load_backend(name).why_not(device, head_size, dtype) is None
    except BackendUnavailable:
        # a package whose backend does not load is no alternative
        return False


def get_attn_backend(
    head_size: int,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    component: str | None = None,
    component_backends: Mapping[str, str] | None = None,
    pipeline_backend: str | None = None,
    supported: Collection[str] | None = None,
    model: str = "the model",
) -> type[AttentionBackend]:
    """The backend class for one component of a pipeline.

    Args:
        head_size: D of the component's attention.
        dtype: of its query, key and value.
        device: where it runs.
        component: its name in the pipeline: transformer, transformer_2, ...
        component_backends: backends named for single components.
        pipeline_backend: the backend named for the whole pipeline.
        supported: what the model family supports; None means everything.
        model: how errors call the model.

    Raises:
        UnknownBackend, UnsupportedHeadSize, BackendUnavailable: as in `backend_on`.
        UnsupportedModel: the model family does not support the chosen backend; lists what it does support.

    Examples:
        >>> import ditattn, torch
        >>> backend = ditattn.get_attn_backend(64, torch.bfloat16, pipeline_backend="permuted_sparse_attn")
        >>> backend.name, backend.is_sparse
        ('permuted_sparse_attn', True)
    """
    selection = select_backend(
        component=component,
        component_backends=component_backends,
        pipeline_backend=pipeline_backend,
        forced=_forced.get(),
        environment=os.environ,
    )
    if selection.backend is not None and supported is not None and selection.backend not in supported:
        names = ", ".join(sorted(supported))
        raise UnsupportedModel(f"{model} does not support '{selection.backend}' ({selection.reason}); it supports {names or 'no backend'}")
    return backend_on(find_device(device), selection.backend, head_size, dtype)
