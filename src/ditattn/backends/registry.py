"""Every attention backend by the name that users type: ours from a literal table, others from installed packages.

A package adds a backend with an entry point of the group `ditattn.backends`:

    [project.entry-points."ditattn.backends"]
    nearest_attn = "my_package.nearest:NearestAttentionBackend"

Nothing of it is imported until somebody names it or lists all backends.
"""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Mapping
from enum import Enum
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from ditattn.errors import BackendUnavailable, UnknownBackend

if TYPE_CHECKING:
    from ditattn.backends.base import AttentionBackend

__all__ = ["BACKENDS", "DEFAULT_BACKEND", "ENTRY_POINTS", "AttentionBackendEnum", "backend_names", "load_backend", "parse_backend_name"]

logger = logging.getLogger("ditattn")

ENTRY_POINTS = "ditattn.backends"

# Literal, so that naming a backend imports none.
BACKENDS: Mapping[str, str] = {
    "torch_sdpa": "ditattn.backends.torch_sdpa:TorchSDPABackend",
    "fa": "ditattn.backends.fa:FABackend",
    "laser_attn": "ditattn.backends.laser_attn:LaserAttentionBackend",
    "block_sparse_attn": "ditattn.backends.block_sparse_attn:BlockSparseAttentionBackend",
    "rain_fusion_attn": "ditattn.backends.rain_fusion_attn:RainFusionAttentionBackend",
}

DEFAULT_BACKEND = "torch_sdpa"
"""What serves where nobody names a backend: exact, and there on every device."""


@cache
def _targets() -> Mapping[str, str]:
    targets = dict(BACKENDS)
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        if point.name in targets or point.name != point.name.lower():
            why = "is taken" if point.name in targets else "is not in lower case"
            logger.warning("entry point %s = %s of group %s is left out: the name %s", point.name, point.value, ENTRY_POINTS, why)
            continue
        targets[point.name] = point.value
    return targets


def backend_names() -> tuple[str, ...]:
    """Every backend of this installation: ours, then those of other packages in the order of the alphabet."""
    return tuple(_targets())


def parse_backend_name(name: str) -> str:
    """The name as it is registered, for a name as users type it, in any case.

    Raises:
        UnknownBackend: names the nearest one and lists all.
    """
    names = backend_names()
    wanted = str(name).lower()
    if wanted in names:
        return wanted
    nearest = difflib.get_close_matches(wanted, names, n=1, cutoff=0)[0]
    raise UnknownBackend(f"no attention backend '{name}'; did you mean '{nearest}'? There is {', '.join(names)}")


def load_backend(name: str) -> type[AttentionBackend]:
    """The class of a backend.

    Raises:
        UnknownBackend: no backend of that name.
        BackendUnavailable: the package that brings it cannot be imported, or brings something else.
    """
    return _load(parse_backend_name(name))


@cache
def _load(name: str) -> type[AttentionBackend]:
    # names alone need no torch
    from ditattn.backends.base import AttentionBackend

    target = _targets()[name]
    module, _, attribute = target.partition(":")
    try:
        backend = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BackendUnavailable(f"attention backend '{name}' cannot be loaded from {target}: {error}") from error
    if not (isinstance(backend, type) and issubclass(backend, AttentionBackend) and backend.name == name):
        raise BackendUnavailable(f"attention backend '{name}': {target} is not an AttentionBackend with name = '{name}'")
    return backend


class _BackendName(str, Enum):
    """A backend's name as an enumeration, for hosts that want one. Equal to the plain string."""

    def __str__(self) -> str:
        return str(self.value)

    @property
    def is_sparse(self) -> bool:
        """True where the backend may drop key blocks."""
        return load_backend(self.value).is_sparse

    @classmethod
    def parse(cls, name: str) -> _BackendName:
        """The member for a name as users type it. Raises as `parse_backend_name`."""
        return cls(parse_backend_name(name))


AttentionBackendEnum = _BackendName("AttentionBackendEnum", {name.upper(): name for name in backend_names()}, module=__name__)  # type: ignore[call-overload]
"""Every backend of this installation, made from the registry."""
