"""Which implementation of an operation serves a call, and why the others do not.

Each op lists its implementations in a literal table. `explain` compares the documented needs of every row with the facts of a call;
nothing is imported except to see whether a needed package exists, and a row's module is loaded only when the row is taken.
"""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from ditattn.arguments import described
from ditattn.errors import BackendUnavailable, UnsupportedCall
from ditattn.packages import Package

__all__ = [
    "KERNEL_HEAD_DIMS",
    "PADDED_HEAD_DIMS",
    "CallFacts",
    "Implementation",
    "Names",
    "Verdict",
    "choose",
    "choose_to_run",
    "explain",
    "kernel_head_dim",
    "load",
    "named_head_dims",
    "names_of",
]

logger = logging.getLogger("ditattn")

Names = str | Sequence[str] | None
"""Implementations that a caller names: one, or several in order of preference; None takes the first possible one."""

HALF = ("bfloat16", "float16")
FLOATS = ("float32", *HALF)
# what torch multiplies, the portable implementations take too
WIDE_FLOATS = (*FLOATS, "float64")
# what the attention kernels of this package multiply
KERNEL_HEAD_DIMS = (32, 64, 96, 128)
# what their implementations, and those of the Ascend operators, take: zeros fill a head up to the next size that is multiplied. Zero
# columns of query and key add nothing to a score, the scale is that of the true size, and zero columns of the value are cut off again
PADDED_HEAD_DIMS = tuple(range(8, 129, 8))


@dataclass(frozen=True)
class CallFacts:
    """What an implementation may be picky about.

    Attributes:
        needs: any of causal, key_lengths, attn_mask, lse, tail (a pooled tail), gqa, unequal_lengths, other_block_size (not the usual 128
            tokens).
        group: query heads per key head.
        num_keys: key tokens; None if not asked about a particular call.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    needs: frozenset[str] = frozenset()
    group: int = 1
    num_keys: int | None = None

    def kind(self) -> CallFacts:
        """The facts without the sizes of one call: what a measurement is made for."""
        return replace(self, group=1, num_keys=None)

    def sentence(self) -> str:
        extras = f", {', '.join(sorted(self.needs))}" if self.needs else ""
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')}, head size {self.head_dim}{extras}"


@dataclass(frozen=True)
class Implementation:
    """One row of an op's table.

    Attributes:
        name: the technique: `reference`, `torch`, `cpu`, `triton`, `ascend`, ...
        target: "module:function", loaded when first taken. The function takes the op's call as a value.
        devices: torch device types; empty means any.
        dtypes: names of torch dtypes.
        head_dims: possible head sizes, those among them that it pads itself; empty means any.
        honours: which `CallFacts.needs` it can serve.
        machine: "module:function" that returns None or the reason why nothing to install would help on this machine.
        packages: what must be installed.
        probe: "module:function" that returns None or the reason why it cannot run here (a library that was not built, a missing device).
        limits: "module:function" that takes the CallFacts and returns None or the reason why it refuses such a call on every machine of
            this kind: what the other attributes cannot say.
        automatic: False for rows that run only when asked for by name.
        computes_in: a dtype coarser than the inputs' in which products are formed; only for rows that are not automatic.
        parts: how many numbers of that dtype an input is split into, each the rest of those before, rounded.
        orders_tokens: the function also takes `order` (and where there is an output of S tokens `inverse`), int64 `[S]`, and applies them
            itself; for the other rows the op reorders copies.
        orders_heads: the same for an order per key head, int64 `[G, S]`.
        fuses_tail: the function also takes a pooled tail; for other rows that honour one the op merges it through the log-sum-exp.
        preference: "module:function" that measures a call's kind once and returns an `ops.preference.Measurement`: where that prefers
            another row, this one is deprioritised, and serves only when asked for by name.
        slow_on: device types whose own rows are much faster: a call that they all refuse is served with a warning.
        provider: the target is an object whose methods `run`, `machine`, `probe` and `limits` are what the fields say for other rows.
    """

    name: str
    target: str
    devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = FLOATS
    head_dims: tuple[int, ...] = ()
    honours: frozenset[str] = frozenset()
    machine: str | None = None
    packages: tuple[Package, ...] = ()
    probe: str | None = None
    limits: str | None = None
    automatic: bool = True
    computes_in: str | None = None
    parts: int = 1
    orders_tokens: bool = False
    orders_heads: bool = False
    fuses_tail: bool = False
    preference: str | None = None
    slow_on: tuple[str, ...] = ()
    provider: bool = False

    @property
    def operation(self) -> str:
        """The op's name: the folder of the target's module."""
        return self.target.partition(":")[0].rpartition(".")[0].rpartition(".")[2]

    def takes_order(self, order: Tensor) -> bool:
        """Whether the function applies such a token order itself."""
        return self.orders_tokens if order.ndim == 1 else self.orders_heads

    def runs_on(self, device: str) -> bool:
        return not self.devices or device in self.devices

    def refusal(self, facts: CallFacts) -> str | None:
        """Why this row cannot serve the call, or None."""
        if not self.runs_on(facts.device):
            return f"runs on {' or '.join(self.devices)}, not on {facts.device}"
        unsuitable = self._answer("machine", self.machine)
        missing = [package.sentence() for package in self.packages if package.missing()]
        if unsuitable or missing:
            return unsuitable or "; ".join(missing)
        return self.mismatch(facts) or self._answer("probe", self.probe)

    def mismatch(self, facts: CallFacts) -> str | None:
        """What of the call's dtype, head size, options or shape the row does not take, or None."""
        dtype = str(facts.dtype).removeprefix("torch.")
        if dtype not in self.dtypes:
            return f"takes {', '.join(self.dtypes)}, not {dtype}"
        if self.head_dims and facts.head_dim not in self.head_dims:
            return f"takes head sizes {named_head_dims(self.head_dims)}, not {facts.head_dim}"
        if unmet := facts.needs - self.honours:
            return f"does not honour {', '.join(sorted(unmet))}"
        return self._answer("limits", self.limits, facts)

    def _answer(self, question: str, target: str | None, *arguments: CallFacts) -> str | None:
        """What the provider or the function named by the field says."""
        if self.provider:
            answer: str | None = getattr(_resolve(self.target), question)(*arguments)
            return answer
        return _resolve(target)(*arguments) if target else None


@dataclass(frozen=True)
class Verdict:
    """An implementation and the reason it cannot serve the call; None means it can.

    Attributes:
        note: what a self-measurement found, for rows that can serve the call and have a preference.
        deprioritised: the measurement prefers another row.
    """

    implementation: Implementation
    reason: str | None = field(default=None)
    note: str | None = None
    deprioritised: bool = False


def kernel_head_dim(head_dim: int) -> int:
    """The smallest head size that kernels multiply, of those that are at least as large."""
    return next(size for size in KERNEL_HEAD_DIMS if head_dim <= size)


def named_head_dims(head_dims: Sequence[int]) -> str:
    """For messages: "32, 64, 96, 128", or "8, 16, ... 128" where they are evenly spaced and many."""
    steps = {after - before for before, after in itertools.pairwise(head_dims)}
    if len(steps) == 1 and len(head_dims) > 4:
        return f"{head_dims[0]}, {head_dims[1]}, ... {head_dims[-1]}"
    return ", ".join(map(str, head_dims))


@cache
def _resolve(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def load(implementation: Implementation) -> Callable[..., Any]:
    """The function behind a row."""
    found = _resolve(implementation.target)
    function: Callable[..., Any] = found.run if implementation.provider else found
    return function


def names_of(implementation: Names) -> tuple[str, ...]:
    """The names in order of preference; none where the caller leaves the choice to the table."""
    if implementation is None:
        return ()
    names = (implementation,) if isinstance(implementation, str) else implementation
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise UnsupportedCall(f"implementation must be a name, several in a list, or None, not {described(implementation)}")
    return tuple(names)


def explain(table: Sequence[Implementation], facts: CallFacts) -> list[Verdict]:
    """Every row of the table with the reason it was or was not possible, in order of preference."""
    verdicts = [Verdict(row, row.refusal(facts)) for row in table]
    possible = {verdict.implementation.name for verdict in verdicts if verdict.reason is None}
    return [_weighed(verdict, facts, possible) for verdict in verdicts]


def _weighed(verdict: Verdict, facts: CallFacts, possible: set[str]) -> Verdict:
    """The verdict with what a measurement says, where the row can serve the call."""
    row = verdict.implementation
    if verdict.reason is not None or row.preference is None:
        return verdict
    measured = _resolve(row.preference)(facts.kind())
    deprioritised = measured.preferred != row.name and measured.preferred in possible
    return Verdict(row, None, measured.sentence(), deprioritised)


@lru_cache(maxsize=1024)
def choose(table: tuple[Implementation, ...], facts: CallFacts, names: tuple[str, ...] = ()) -> Implementation:
    """The row that serves the call: the first possible one of those named, or without names the first possible automatic one.

    Decided once per call signature.

    Raises:
        BackendUnavailable: no named row can run on this machine.
        UnsupportedCall: no such name, the named rows refuse the call's shape or options, or no row is possible.
    """
    if names:
        return _named(table, facts, names)
    verdicts = explain(table, facts)
    for verdict in verdicts:
        if verdict.reason is None and verdict.implementation.automatic and not verdict.deprioritised:
            return verdict.implementation
    reasons = "; ".join(f"{v.implementation.name}: {v.reason}" for v in verdicts if v.reason)
    raise UnsupportedCall(f"no implementation takes this call ({facts.sentence()}). {reasons}")


@lru_cache(maxsize=1024)
def choose_to_run(table: tuple[Implementation, ...], facts: CallFacts, names: tuple[str, ...] = ()) -> Implementation:
    """As `choose`, for a call that is about to run: warns of a row that is slow there and was not asked for, with the others' reasons."""
    row = choose(table, facts, names)
    if not names and facts.device in row.slow_on:
        _warn_once(_why_slow(table, facts, row))
    return row


def _why_slow(table: Sequence[Implementation], facts: CallFacts, row: Implementation) -> str:
    faster = [other for other in table if facts.device in other.devices and other.automatic]
    reasons: dict[str, list[str]] = {}
    for other in faster:
        reasons.setdefault(str(other.refusal(facts)), []).append(other.name)
    listed = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    return f"{row.operation} runs as '{row.name}', which is slow on {facts.device} ({facts.sentence()}). {listed}"


@cache
def _warn_once(message: str) -> None:
    # without sizes in it the message is the same for all calls of a kind
    logger.warning("%s", message)


def _named(table: tuple[Implementation, ...], facts: CallFacts, names: Sequence[str]) -> Implementation:
    rows = [_row_of(table, facts, name) for name in names]
    reasons = [row.refusal(facts) for row in rows]
    for row, reason in zip(rows, reasons, strict=True):
        if reason is None:
            return row
    possible = [row.name for row in table if row.refusal(facts) is None]
    asked = f"implementation {' or '.join(map(repr, names))} was asked for ({facts.sentence()})"
    why = "; ".join(f"{row.name}: {reason}" for row, reason in zip(rows, reasons, strict=True)) if len(rows) > 1 else str(reasons[0])
    message = f"{asked}: {why}. Possible here: {', '.join(possible) or 'none'}"
    only_the_call = all(reason == row.mismatch(facts) for row, reason in zip(rows, reasons, strict=True))
    raise (UnsupportedCall if only_the_call else BackendUnavailable)(message)


def _row_of(table: tuple[Implementation, ...], facts: CallFacts, name: str) -> Implementation:
    """The row called `name`; a name may have one row per device, then the row for this device answers."""
    rows = [row for row in table if row.name == name]
    if not rows:
        raise UnsupportedCall(f"no implementation named '{name}'; there is {', '.join(dict.fromkeys(row.name for row in table))}")
    return next((row for row in rows if row.runs_on(facts.device)), rows[0])
