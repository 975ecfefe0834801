"""Which backend can be computed by what, on which device of this machine, and why not."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ditattn.backends.base import AttentionBackend
from ditattn.backends.registry import RECOMMENDED_BACKEND, usable_backends
from ditattn.cli.device import why_no_device
from ditattn.cli.job import ANY_HEAD_SIZE
from ditattn.devices import DEVICES, Device, find_device
from ditattn.errors import ConfigError
from ditattn.ops.mx_linear.call import LinearFacts
from ditattn.ops.table import CallFacts, Implementation, Verdict, explain
from ditattn.packages import Package
from ditattn.quantization.request import METHODS

__all__ = ["QuantizationRow", "Row", "availability", "devices", "quantization_availability"]

DTYPE = torch.bfloat16
# possible for every implementation
ANY_IN_FEATURES = 1024


@dataclass(frozen=True)
class Row:
    """One implementation of one operation of one backend on one device.

    Attributes:
        device, backend, operation, implementation: names.
        sparse: the backend may drop key blocks.
        recommended: what to take without a reason for another one.
        automatic: it may be taken without being asked for by name.
        available: it can run here.
        serves: it is what runs when the backend is named.
        reason: why it cannot run; None if it can.
        install: commands that install what is missing; None if no command is known to help.
        note: what a self-measurement found that decides whether this one or another exact one is taken; None where nothing is measured.
    """

    device: str
    backend: str
    sparse: bool
    recommended: bool
    operation: str
    implementation: str
    automatic: bool
    available: bool
    serves: bool
    reason: str | None
    install: str | None
    note: str | None


@dataclass(frozen=True)
class QuantizationRow:
    """One implementation of linear layers in one format on one device. Attributes as those of `Row`."""

    device: str
    quantization: str
    operation: str
    implementation: str
    automatic: bool
    available: bool
    serves: bool
    reason: str | None
    install: str | None


def devices(only: str | None = None) -> list[dict[str, Any]]:
    """Device types with the name of the device, or the reason why there is none."""
    found = []
    for device_type in _device_types(only):
        reason = why_no_device(device_type)
        found.append({"device": device_type, "name": None if reason else find_device(device_type).device_name(), "reason": reason})
    return found


def availability(only: str | None = None) -> list[Row]:
    """Every row, device by device."""
    backends = usable_backends()
    return [row for device_type in _device_types(only) for backend in backends for row in _rows(find_device(device_type), backend)]


def quantization_availability(only: str | None = None) -> list[QuantizationRow]:
    """Every format and what computes it, device by device."""
    return [
        row for device_type in _device_types(only) for method in METHODS for row in _quantization_rows(find_device(device_type), method)
    ]


def _quantization_rows(device: Device, method: str) -> Iterator[QuantizationRow]:
    needs = frozenset({"dual_scale"} if method == "mxfp4_dualscale" else ())
    served = False
    refused = why_no_device(device.device_type)
    for verdict in _verdicts("mx_linear", LinearFacts(device.device_type, DTYPE, ANY_IN_FEATURES, needs)):
        row, reason = verdict.implementation, _joined(refused, verdict.reason)
        serves = reason is None and row.automatic and not served
        served = served or serves
        yield QuantizationRow(
            device=device.device_type,
            quantization=method,
            operation="mx_linear",
            implementation=row.name,
            automatic=row.automatic,
            available=reason is None,
            serves=serves,
            reason=reason,
            install=_install_of(device, row.packages) if reason else None,
        )


def _install_of(device: Device, further: tuple[Package, ...]) -> str | None:
    commands = dict.fromkeys(package.install for package in (*device.packages, *further) if package.missing())
    return "; ".join(commands) or None


def _device_types(only: str | None) -> list[str]:
    if only is None:
        return list(DEVICES)
    device_type = only.partition(":")[0]
    if device_type not in DEVICES:
        # torch knows further device types, and npu only after torch_npu was imported
        try:
            torch.device(device_type)
        except RuntimeError:
            raise ConfigError(f"--device {only} is no torch device; there is {', '.join(DEVICES)}") from None
    return [device_type]


def _rows(device: Device, backend: type[AttentionBackend]) -> Iterator[Row]:
    device_type = device.device_type
    refused = backend.why_not(device)
    if not backend.ops:
        yield _own_kernel(device, backend, refused)
    for operation in backend.ops:
        named = backend.implementations_on(device_type) if operation == backend.ops[0] else ()
        served = False
        for verdict in _verdicts(operation, CallFacts(device_type, DTYPE, ANY_HEAD_SIZE)):
            implementation = verdict.implementation
            if named and implementation.name not in named:
                # a backend that insists on implementations is never computed by another
                continue
            reason = _joined(refused, verdict.reason)
            taken = bool(named) or (implementation.automatic and not verdict.deprioritised)
            serves = reason is None and not served and taken
            served = served or serves
            yield Row(
                device=device_type,
                backend=backend.name,
                sparse=backend.is_sparse,
                recommended=backend.name == RECOMMENDED_BACKEND,
                operation=operation,
                implementation=implementation.name,
                automatic=implementation.automatic,
                available=reason is None,
                serves=serves,
                reason=reason,
                install=_install(device, backend, implementation.packages) if reason else None,
                note=None if named or reason else verdict.note,
            )


def _own_kernel(device: Device, backend: type[AttentionBackend], refused: str | None) -> Row:
    """The row of a backend that is computed by none of our operations."""
    return Row(
        device=device.device_type,
        backend=backend.name,
        sparse=backend.is_sparse,
        recommended=backend.name == RECOMMENDED_BACKEND,
        operation="attention",
        implementation=backend.name,
        automatic=True,
        available=refused is None,
        serves=refused is None,
        reason=refused,
        install=_install(device, backend, ()) if refused else None,
        note=None,
    )


def _verdicts(operation: str, facts: CallFacts) -> list[Verdict]:
    """The rows of an operation's table as judged; of several with one name the one that is for this device."""
    module = importlib.import_module(f"ditattn.ops.{operation}")
    table: tuple[Implementation, ...] = (*module.TABLE, *getattr(module, "PORTABLE", ()))
    best: dict[str, Verdict] = {}
    for verdict in explain(table, facts):
        row = verdict.implementation
        if row.name not in best or (facts.device in row.devices and facts.device not in best[row.name].implementation.devices):
            best[row.name] = verdict
    return list(best.values())


def _joined(*reasons: str | None) -> str | None:
    return "; ".join(dict.fromkeys(part for reason in reasons if reason for part in reason.split("; "))) or None


def _install(device: Device, backend: type[AttentionBackend], further: tuple[Package, ...]) -> str | None:
    needed = (*device.packages, *backend.packages.get(device.device_type, ()), *further)
    commands = dict.fromkeys(package.install for package in needed if package.missing())
    return "; ".join(commands) or None
