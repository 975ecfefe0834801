"""The plan of a call: a new one, or one that an earlier call of the layer has made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ditattn.backends.base import CallRecord
from ditattn.backends.sparse.metadata import SparseAttentionMetadata
from ditattn.plan.block_plan import BlockPlan
from ditattn.plan.reuse import ForwardId, PlanMemory

__all__ = ["LayerPlans", "NotReused"]


class NotReused:
    """Why a call that could have reused a plan by its configuration made one of its own. The words users read in reports."""

    STEP_UNKNOWN = "step unknown"
    UNKNOWN_PADDING = "key lengths known to the device only"


class LayerPlans:
    """The plans of one layer, kept as long as its configuration says."""

    def __init__(self) -> None:
        self._kept = PlanMemory()

    def of_call(self, query: Tensor, key: Tensor, metadata: SparseAttentionMetadata, make: Callable[[], BlockPlan]) -> CallRecord:
        """The call with its plan: a kept one where the metadata lets one serve, else a new one."""
        step, policy = metadata.current_timestep, metadata.reuse
        if not policy.reuses:
            return CallRecord(None, make())
        unknown_padding = metadata.key_lengths is not None and metadata.known_key_lengths is None
        if step is None or unknown_padding:
            # asking the device whether two steps or branches pad alike would wait for it in every layer
            why = NotReused.STEP_UNKNOWN if step is None else NotReused.UNKNOWN_PADDING
            return CallRecord(None, make(), not_reused=why)
        facts, forward_id = _plan_facts(query, key, metadata), metadata.forward_id or ForwardId()
        kept = self._kept.find(step, forward_id, facts, policy)
        if kept is not None:
            return CallRecord(None, kept, reused=True)
        made = make()
        self._kept.keep(made, step, forward_id, facts, policy)
        return CallRecord(None, made)

    def forget(self) -> None:
        """Release every plan."""
        self._kept.forget()


def _plan_facts(query: Tensor, key: Tensor, metadata: SparseAttentionMetadata) -> object:
    """What a plan depends on besides the values of its tokens; the metadata brings the fields that a backend adds."""
    timeless = replace(metadata, current_timestep=None, key_lengths=None, forward_id=None)
    return (timeless, query.shape, key.shape, query.dtype, query.device)
