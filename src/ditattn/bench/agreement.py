"""Who may be timed: a call whose result, at its smallest size, is that of the reference. Another is left out, with the reason."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ditattn.bench.budget import Call
from ditattn.bench.timing import Effort

__all__ = ["agreeing", "why_not"]


def agreeing(calls: Iterable[Call], effort: Effort) -> tuple[list[Call], dict[str, str]]:
    """The calls that may be timed, in order; by name, why others may not."""
    kept, left_out = [], {}
    for call in calls:
        if reason := why_not(call, effort):
            left_out[call.name] = reason
        else:
            kept.append(call)
    return kept, left_out


def why_not(call: Call, effort: Effort) -> str | None:
    """Why a call may not be timed, or None. Runs it once at its smallest size, beside what it should return there."""
    if call.expected is None:
        return None
    size = call.sizes[0]
    effort.progress(f"comparing {call.name} with the reference, at {call.label(size)}")
    try:
        found = call.make(size)()
    except Exception as error:  # noqa: BLE001 - code of others, which may raise anything; what it said is shown
        return _in_one_line(error)
    difference, limit = _difference(found, call.expected(size)), _limit(found.dtype)
    # not less: NaN differs
    if not difference < limit:
        return f"its result differs from the reference by {difference:.2g} of the norm at {call.label(size)}, more than {limit:.2g}"
    return None


def _in_one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _difference(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference as a share of that of the expected; both in the same layout."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _limit(dtype: torch.dtype) -> float:
    """Ten to twenty times what SDPA's own rounding costs in the data type."""
    return max(4 * torch.finfo(dtype).eps, 1e-5)
