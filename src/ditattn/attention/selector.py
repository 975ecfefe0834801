"""Which backend serves a component: names by priority, then the platform's word."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from ditattn.attention.interface import AttentionBackend, AttentionBackendEnum
from ditattn.errors import UnsupportedModel
from ditattn.platforms import Platform, get_platform

__all__ = ["ENVIRONMENT_VARIABLE", "Selection", "force_attn_backend", "get_attn_backend", "load_backend", "select_backend"]

ENVIRONMENT_VARIABLE = "DITATTN_ATTENTION_BACKEND"

_forced: ContextVar[AttentionBackendEnum | None] = ContextVar("ditattn_forced_backend", default=None)


@dataclass(frozen=True)
class Selection:
    """A choice and its reason.

    Attributes:
        backend: the chosen backend; None means automatic.
        reason: which rule chose it.
    """

    backend: AttentionBackendEnum | None
    reason: str


@contextlib.contextmanager
def force_attn_backend(backend: AttentionBackendEnum | str | None) -> Iterator[None]:
    """Every selection inside the block takes `backend`, whatever else is asked; None lifts an outer force."""
    token = _forced.set(None if backend is None else AttentionBackendEnum.parse(backend))
    try:
        yield
    finally:
        _forced.reset(token)


def select_backend(
    *,
    component: str | None = None,
    component_backends: Mapping[str, AttentionBackendEnum | str] | None = None,
    pipeline_backend: AttentionBackendEnum | str | None = None,
    forced: AttentionBackendEnum | str | None = None,
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
            return Selection(AttentionBackendEnum.parse(name), reason)
    return Selection(None, "automatic: the platform's best dense backend")


def get_attn_backend(
    head_size: int,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    component: str | None = None,
    component_backends: Mapping[str, AttentionBackendEnum | str] | None = None,
    pipeline_backend: AttentionBackendEnum | str | None = None,
    supported: Collection[AttentionBackendEnum] | None = None,
    model: str = "the model",
    platform: Platform | None = None,
) -> type[AttentionBackend]:
    """The backend class for one component of a pipeline.

    Args:
        head_size, dtype, device: of the component's attention.
        component: its name in the pipeline: transformer, transformer_2, ...
        component_backends: backends named for single components.
        pipeline_backend: the backend named for the whole pipeline.
        supported: what the model family supports; None means everything.
        model: how errors call the model.
        platform: overrides the platform of `device`.

    Raises:
        UnknownBackend, UnsupportedHeadSize, BackendUnavailable: as in `Platform.get_attn_backend_cls_str`.
        UnsupportedModel: the model family does not support the chosen backend; lists what it does support.
    """
    selection = select_backend(
        component=component,
        component_backends=component_backends,
        pipeline_backend=pipeline_backend,
        forced=_forced.get(),
        environment=os.environ,
    )
    if selection.backend is not None and supported is not None and selection.backend not in supported:
        names = ", ".join(sorted(str(backend) for backend in supported))
        raise UnsupportedModel(f"{model} does not support '{selection.backend}' ({selection.reason}); it supports {names or 'no backend'}")
    return load_backend((platform or get_platform(device)).get_attn_backend_cls_str(selection.backend, head_size, dtype))


def load_backend(path: str) -> type[AttentionBackend]:
    """The class behind a dotted path."""
    module, _, name = path.rpartition(".")
    backend: type[AttentionBackend] = getattr(importlib.import_module(module), name)
    return backend
