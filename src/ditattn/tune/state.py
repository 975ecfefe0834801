"""What a search knows, on disk, so that an interrupted one goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ditattn.compare.cache import facts_digest
from ditattn.compare.rank_group import ALONE, RankGroup
from ditattn.errors import ConfigError
from ditattn.runtime.probe import CellReading
from ditattn.tune.candidate import Candidate, Outcome

__all__ = ["TuneState", "state_name"]


def state_name(facts: Mapping[str, Any]) -> str:
    """A file name that any changed fact changes."""
    return f"tune_{facts_digest(facts)[:12]}.state.json"


@dataclass
class TuneState:
    """The state of one search; every change is on disk before it counts. Of several ranks the first one reads and writes it.

    Attributes:
        path: of the file.
        facts: the question, for people who read the file.
        attention_share: of the dense time, with a step cache of its time alone.
        cache_alone: what the step cache does with dense attention; None without one, and until it was run.
        readings: of the probe, by sparsity; empty until it was run.
        outcomes: by candidate.
        ranks: that search together.
    """

    path: Path
    facts: dict[str, Any]
    attention_share: float = 0.0
    cache_alone: Outcome | None = None
    readings: dict[float, list[CellReading]] = field(default_factory=dict)
    outcomes: dict[Candidate, Outcome] = field(default_factory=dict)
    ranks: RankGroup = ALONE

    @classmethod
    def open(cls, folder: Path, facts: dict[str, Any], ranks: RankGroup = ALONE) -> TuneState:
        """The state of an earlier run of the same search, or an empty one.

        Raises:
            ConfigError: the file is damaged.
        """
        return replace(ranks.broadcast(lambda: cls._read(folder, facts)), ranks=ranks)

    @classmethod
    def _read(cls, folder: Path, facts: dict[str, Any]) -> TuneState:
        path = folder / state_name(facts)
        if not path.exists():
            return cls(path, facts)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            alone = content.get("cache_alone")
            return cls(
                path,
                facts,
                content["attention_share"],
                None if alone is None else Outcome.from_mapping(alone),
                {float(key): [CellReading(**one) for one in some] for key, some in content["readings"].items()},
                {_candidate(one["candidate"]): Outcome.from_mapping(one["outcome"]) for one in content["outcomes"]},
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is damaged ({type(error).__name__}): remove it to begin anew") from None

    def keep_cache_alone(self, outcome: Outcome, attention_share: float) -> None:
        self.cache_alone, self.attention_share = outcome, attention_share
        self._write()

    def keep_probe(self, readings: Mapping[float, list[CellReading]], attention_share: float) -> None:
        self.readings, self.attention_share = dict(readings), attention_share
        self._write()

    def keep_outcome(self, candidate: Candidate, outcome: Outcome) -> None:
        self.outcomes[candidate] = outcome
        self._write()

    def _write(self) -> None:
        if not self.ranks.is_first:
            return
        content = {
            "facts": self.facts,
            "attention_share": self.attention_share,
            "cache_alone": None if self.cache_alone is None else _plain(self.cache_alone),
            "readings": {str(key): [asdict(one) for one in some] for key, some in self.readings.items()},
            "outcomes": [{"candidate": asdict(candidate), "outcome": _plain(outcome)} for candidate, outcome in self.outcomes.items()],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        draft.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        draft.replace(self.path)


def _plain(outcome: Outcome) -> dict[str, Any]:
    # str: infinity is no JSON number
    return {**asdict(outcome), "psnr": str(outcome.psnr)}


def _candidate(values: Mapping[str, Any]) -> Candidate:
    return Candidate(**{**values, "layers": tuple(values["layers"])})
