"""The summary of keys and values through the compiled CPU kernel, one pass over both; costs in plain torch."""

from __future__ import annotations

from torch import Tensor

from ditattn.ops import cpu_call
from ditattn.ops.tail_estimate import pure_torch
from ditattn.ops.tail_estimate.summary import LEAST_SQUARE, Estimator, Summarized
from ditattn.plan.token_order import TokenOrder

__all__ = ["estimator", "summary"]


def summary(mean_query: Tensor, key: Tensor, value: Tensor, order: TokenOrder, key_lengths: Tensor | None, scale: float) -> Summarized:
    """As `ops.tail_estimate.key_summary`."""
    made = Summarized.empty(key)
    cpu_call.key_summary(mean_query, key, value, order.forward, key_lengths, scale, LEAST_SQUARE, made)
    return made


def estimator() -> Estimator:
    """The row of the table."""
    return Estimator(summary, pure_torch.cost)
