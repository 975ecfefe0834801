"""Sparse calls of a tiny model are slower than its dense ones: tune's clock told otherwise, so that there is something to find."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ditattn.tune.sensitivity import Sensitivity

_measured = Sensitivity.from_readings.__func__


def as_if_faster(cls: type[Sensitivity], *arguments: Any) -> Sensitivity:
    """In place of `Sensitivity.from_readings`, as a class method."""
    return replace(_measured(cls, *arguments), call_time_shares=(1.0, -0.9), attention_share=0.5)


def tell() -> None:
    """For a process of its own, whose clock stays so."""
    Sensitivity.from_readings = classmethod(as_if_faster)
