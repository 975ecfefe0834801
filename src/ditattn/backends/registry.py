"""Every attention backend by the name that users type: ours from a literal table, others from installed packages.

A package adds a backend with an entry point of the group `ditattn.backends`:

    [project.entry-points."ditattn.backends"]
    nearest_attn = "my_package.nearest:NearestAttentionBackend"

Nothing of it is imported until somebody names it or lists all backends. What cannot be used is left out, with its reason, and disturbs no
other backend.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ditattn.errors import BackendUnavailable, UnknownBackend

if TYPE_CHECKING:
    from ditattn.backends.base import AttentionBackend

__all__ = [
    "BACKENDS",
    "DEFAULT_BACKEND",
    "ENTRY_POINTS",
    "RECOMMENDED_BACKEND",
    "AttentionBackendEnum",
    "LeftOut",
    "backend_names",
    "left_out",
    "load_backend",
    "parse_backend_name",
    "usable_backends",
]

logger = logging.getLogger("ditattn")

ENTRY_POINTS = "ditattn.backends"

# Literal, so that naming a backend imports none.
BACKENDS: Mapping[str, str] = {
    "torch_sdpa": "ditattn.backends.torch_sdpa:TorchSDPABackend",
    "fa": "ditattn.backends.fa:FABackend",
    "laser_attn": "ditattn.backends.laser_attn:LaserAttentionBackend",
    "block_sparse_attn": "ditattn.backends.block_sparse_attn:BlockSparseAttentionBackend",
    "rain_fusion_attn": "ditattn.backends.rain_fusion_attn:RainFusionAttentionBackend",
    "permuted_sparse_attn": "ditattn.backends.permuted_sparse_attn:PermutedSparseAttentionBackend",
}

DEFAULT_BACKEND = "torch_sdpa"
"""What serves where nobody names a backend: exact, and there on every device."""

RECOMMENDED_BACKEND = "permuted_sparse_attn"
"""What a user without a reason to take another sparse backend should take."""


@dataclass(frozen=True)
class LeftOut:
    """An entry point that cannot be used.

    Attributes:
        name, target: as the package declares them.
        package: which package; None if its metadata do not say.
        reason: why not.
    """

    name: str
    target: str
    package: str | None
    reason: str

    @classmethod
    def of(cls, point: EntryPoint, reason: str) -> LeftOut:
        return cls(point.name, point.value, point.dist.name if point.dist else None, reason)

    def sentence(self) -> str:
        """For people."""
        return f"'{self.name}' of package {self.package or '(unknown)'} is left out: {self.reason}"


@cache
def _declared() -> tuple[Mapping[str, EntryPoint], tuple[LeftOut, ...]]:
    """Entry points by name, and those whose names cannot be taken. Imports nothing."""
    points = {name: EntryPoint(name, target, ENTRY_POINTS) for name, target in BACKENDS.items()}
    refused = []
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: (point.name, point.value)):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", point.name):
            refused.append(LeftOut.of(point, "its name must be of lower-case letters, digits and underscores, as nearest_attn"))
        elif point.name in points:
            refused.append(LeftOut.of(point, f"the name is taken by {points[point.name].value}"))
        else:
            points[point.name] = point
    for one in refused:
        logger.warning("attention backend %s", one.sentence())
    return points, tuple(refused)


def backend_names() -> tuple[str, ...]:
    """Every backend of this installation: ours, then those of other packages in the order of the alphabet."""
    return tuple(_declared()[0])


def parse_backend_name(name: str) -> str:
    """The name as it is registered, for a name as users type it, in any case.

    Raises:
        UnknownBackend: names the nearest one and lists all.
    """
    names = backend_names()
    wanted = str(name).lower()
    if wanted in names:
        return wanted
    for one in _declared()[1]:
        if one.name.lower() == wanted:
            raise UnknownBackend(f"attention backend {one.sentence()}. There is {', '.join(names)}")
    nearest = difflib.get_close_matches(wanted, names, n=1, cutoff=0)[0]
    raise UnknownBackend(f"no attention backend '{name}'; did you mean '{nearest}'? There is {', '.join(names)}")


def load_backend(name: str) -> type[AttentionBackend]:
    """The class of a backend.

    Raises:
        UnknownBackend: no backend of that name.
        BackendUnavailable: the package that brings it cannot be imported, or brings something else.
    """
    found = parse_backend_name(name)
    try:
        return _load(found)
    except _Unusable as error:
        raise BackendUnavailable(f"attention backend '{found}' cannot be used: {error}") from error.__cause__


class _Unusable(Exception):
    """Why an entry point brings no backend."""


@cache
def _load(name: str) -> type[AttentionBackend]:
    point = _declared()[0][name]
    try:
        backend = point.load()
    except Exception as error:
        # another package's code may fail in any way
        raise _Unusable(f"{point.value} does not load: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if (problem := _problem(backend, name)) is not None:
        raise _Unusable(f"{point.value} {problem}")
    loaded: type[AttentionBackend] = backend
    return loaded


def _problem(backend: object, name: str) -> str | None:
    """Why the object is not the backend of that name, or None."""
    # names alone need no torch
    from ditattn.backends.base import AttentionBackend

    if not (isinstance(backend, type) and issubclass(backend, AttentionBackend)):
        return "is not a subclass of ditattn.AttentionBackend"
    if (own := getattr(backend, "name", None)) != name:
        return f"has name = {own!r}, not '{name}'"
    if not hasattr(backend, "impl_cls"):
        return "has no impl_cls"
    unknown = [operation for operation in backend.ops if find_spec(f"ditattn.ops.{operation}") is None]
    return f"has ops that do not exist: {', '.join(unknown)}" if unknown else None


def usable_backends() -> tuple[type[AttentionBackend], ...]:
    """Every backend that can be loaded, in the order of `backend_names`."""
    return _tried()[0]


def left_out() -> tuple[LeftOut, ...]:
    """Backends of other packages that cannot be used, with the reasons."""
    return (*_declared()[1], *_tried()[1])


def _tried() -> tuple[tuple[type[AttentionBackend], ...], tuple[LeftOut, ...]]:
    usable, broken = [], []
    for name, point in _declared()[0].items():
        try:
            usable.append(_load(name))
        except _Unusable as error:
            broken.append(LeftOut.of(point, str(error)))
    return tuple(usable), tuple(broken)


class _BackendName(str, Enum):  # noqa: UP042 - mypy cannot follow a StrEnum that is called to make members
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
"""Every backend of this installation, made from the registry. A member equals its plain name.

Examples:
    >>> import ditattn
    >>> ditattn.AttentionBackendEnum.RAIN_FUSION_ATTN.is_sparse
    True
    >>> ditattn.AttentionBackendEnum.parse("FA") == "fa"
    True
"""
