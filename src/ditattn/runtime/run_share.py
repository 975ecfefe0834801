"""How much of a run's self-attention ran sparse: a warning where it was next to nothing, and what rules it out from the start."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

from ditattn.backends.base import CallRecord
from ditattn.backends.config import AttentionConfig
from ditattn.backends.sparse import Reason, SparseAttentionMetadata

__all__ = ["KEYS", "RunShare", "holds_for_the_run"]

logger = logging.getLogger("ditattn")

NEXT_TO_NOTHING = 0.1

# the key that a reason goes back to
KEYS = {
    Reason.SPARSITY_ZERO: "sparsity",
    Reason.FIRST_STEPS: "skip_first_steps",
    Reason.LAST_STEPS: "skip_last_steps",
    Reason.REFRESH: "residual",
    Reason.SKIPPED_LAYER: "skip_layers",
    Reason.SHORT: "min_tokens",
}


class RunShare:
    """Counts the self-attention calls of one run after another, of the denoisers that a sparse backend serves."""

    def __init__(self) -> None:
        self._sparse = 0
        self._dense: Counter[str] = Counter()
        self._said = False

    def add(self, record: CallRecord) -> None:
        """One call."""
        if record.reason is None:
            self._sparse += 1
        else:
            self._dense[record.reason] += 1

    def warn(self, configs: Iterable[tuple[str, AttentionConfig]]) -> None:
        """Log a warning if less than a tenth of the calls ran sparse, once per run.

        Args:
            configs: names of the sparse backends that serve, and their configurations.
        """
        calls = self._sparse + sum(self._dense.values())
        if self._said or calls == 0 or self._sparse >= NEXT_TO_NOTHING * calls:
            return
        self._said = True
        served = list(configs)
        names = ", ".join(dict.fromkeys(name for name, _ in served))
        settings = ", ".join(dict.fromkeys(filter(None, (self._settings(config) for _, config in served))))
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self._dense.most_common())
        logger.warning(
            "%s: %s of the %d self-attention calls of this run were sparse. Dense: %s%s",
            names,
            f"only {self._sparse}" if self._sparse else "none",
            calls,
            reasons,
            f"; the settings are {settings}" if settings else "",
        )

    def _settings(self, config: AttentionConfig) -> str:
        """The keys that the reasons go back to."""
        keys = [key for reason, key in KEYS.items() if reason in self._dense and hasattr(config, key)]
        return ", ".join(f"{key}={getattr(config, key)}" for key in keys)

    def forget(self) -> None:
        """Another run begins."""
        self._sparse, self._dense, self._said = 0, Counter(), False


def holds_for_the_run(reason: str, metadata: SparseAttentionMetadata, num_layers: int) -> bool:
    """True if a call that was asked to run densely shows that every call of the run will."""
    if reason in (Reason.SPARSITY_ZERO, Reason.SHORT):
        return True
    if reason in (Reason.FIRST_STEPS, Reason.LAST_STEPS):
        dense = (metadata.skip_first_steps or 0) + (metadata.skip_last_steps or 0)
        return metadata.num_steps is not None and dense >= metadata.num_steps
    return reason == Reason.SKIPPED_LAYER and metadata.skip_layers.issuperset(range(num_layers))
