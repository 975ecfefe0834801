"""Plans that serve several steps or branches: which kept plan still fits a call, and when a new one must be made."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from ditattn.plan.block_plan import BlockPlan

__all__ = ["NO_PLACE", "ForwardId", "PlanMemory", "ReusePolicy"]

# unnamed forwards of one step that count as branches: a model that is called at one timestep for ever must not fill the memory, and no plan
# fits all that it is given
MAX_UNNAMED = 4

# the number of a forward whose plans serve no other
NO_PLACE = MAX_UNNAMED


@dataclass(frozen=True)
class ForwardId:
    """Which forward of the denoiser a call belongs to, beside its step.

    Attributes:
        run: number of the run (one call of a pipeline, usually); no plan passes from one run to another.
        branch: name of the branch of classifier-free guidance; None if the host names none.
        number: where nobody names the branches, the forward's place among the forwards of its step; else 0.
    """

    run: int = 0
    branch: str | None = None
    number: int = 0


@dataclass(frozen=True)
class ReusePolicy:
    """How long a plan serves.

    Attributes:
        refresh_steps: the plan of step s serves steps s .. s + refresh_steps - 1.
        share_between_branches: it also serves the other branches.
    """

    refresh_steps: int = 1
    share_between_branches: bool = False

    @property
    def reuses(self) -> bool:
        """False if every call makes its own plan."""
        return self.refresh_steps > 1 or self.share_between_branches


@dataclass
class _Kept:
    """A plan, what it was made for, and the last step in which it served each branch."""

    plan: BlockPlan
    facts: object
    run: int
    made_at: int
    served: dict[Hashable, int]


class PlanMemory:
    """The plans of one layer that later calls may use: one per branch, or one for all where branches share."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, _Kept] = {}

    def find(self, step: int, forward_id: ForwardId, facts: object, policy: ReusePolicy) -> BlockPlan | None:
        """The plan that serves a call, or None if the call must make one.

        Args:
            step: of the call, 0 first.
            forward_id: the forward it belongs to.
            facts: all else that a plan depends on (shapes, grid, settings, device); compared for equality.
            policy: as in `keep`.
        """
        branch = (forward_id.branch, forward_id.number)
        kept = self._kept.get(_place(forward_id, policy)) if forward_id.number < MAX_UNNAMED else None
        if kept is None or kept.run != forward_id.run or not 0 <= step - kept.made_at < policy.refresh_steps or kept.facts != facts:
            return None
        if max(kept.served.values()) > step or kept.served.get(branch, -1) >= step:
            # a step that goes back, or a branch that was served in this step already: another forward, with tokens of its own
            return None
        if branch not in kept.served and forward_id.branch is None and step == 0:
            # may as well be the first step of another run whose beginning nobody announced
            return None
        kept.served[branch] = step
        return kept.plan

    def keep(self, plan: BlockPlan, step: int, forward_id: ForwardId, facts: object, policy: ReusePolicy) -> None:
        """Remember a plan that a call made."""
        if policy.reuses and forward_id.number < MAX_UNNAMED:
            branch = (forward_id.branch, forward_id.number)
            self._kept[_place(forward_id, policy)] = _Kept(plan, facts, forward_id.run, step, {branch: step})

    def forget(self) -> None:
        """Release every plan."""
        self._kept.clear()


def _place(forward_id: ForwardId, policy: ReusePolicy) -> Hashable:
    return None if policy.share_between_branches else (forward_id.branch, forward_id.number)
