"""What a search found, as a configuration file and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ditattn.backends.setting import Setting
from ditattn.tune.candidate import Candidate, Outcome, Target

__all__ = ["Checked", "Finding", "count_clips", "yaml_text"]


@dataclass(frozen=True)
class Checked:
    """The result on clips that it was not tuned on.

    Attributes:
        num_clips: how many.
        psnr, ssim: of the worst one.
        speed_up, least_speed_up: median and worst, dense and sparse runs taking turns.
        meets: the target is met there too.
    """

    num_clips: int
    psnr: float
    ssim: float | None
    speed_up: float
    least_speed_up: float
    meets: bool

    @property
    def is_faster(self) -> bool:
        return self.speed_up > 1

    def words(self, target: Target) -> str:
        ssim = "" if self.ssim is None else f", SSIM {self.ssim:.4f}"
        verdict = "meets the target" if self.meets else f"misses the target by {max(target.psnr - self.psnr, 0):.2f} dB"
        if not self.meets and self.psnr >= target.psnr:
            verdict = "misses the target in SSIM"
        speed = f"{self.speed_up:.2f}x (worst {self.least_speed_up:.2f}x)"
        return f"on {count_clips(self.num_clips)} it was not tuned on: worst PSNR {self.psnr:.2f} dB{ssim}, {speed}: {verdict}"


@dataclass(frozen=True)
class Finding:
    """Everything to be written down.

    Attributes:
        setting: to be used.
        best: the candidate in it.
        checked: None if the search was interrupted before.
        contradictions: pairs whose order the probe had wrong, of `pairs`.
    """

    setting: Setting
    best: Candidate
    target: Target
    outcomes: Mapping[Candidate, Outcome]
    facts: Mapping[str, Any]
    checked: Checked | None
    contradictions: Sequence[tuple[Candidate, Candidate]]
    pairs: int

    def summary(self) -> list[str]:
        """Lines for people."""
        found = self.outcomes[self.best]
        clips = len(self.facts["clips"])
        lines = [
            f"{self.setting.backend}: {self.best.words()}",
            f"target: {self.target.words()}, on the worst clip",
            f"on the {count_clips(clips)} it was tuned on, after {len(self.outcomes)} runs: {found.words()}",
            "not checked on other clips" if self.checked is None else self.checked.words(self.target),
        ]
        if self.checked is not None and not self.checked.is_faster:
            lines.append("there it was not faster than dense: on this machine nothing is gained by it")
        if self.contradictions:
            expected, better = self.contradictions[0]
            count = f"in {len(self.contradictions)} of {self.pairs} pairs of runs"
            lines.append(
                f"the probe disagreed with the pixels {count}; it expected less damage of ({expected.words()}) than of ({better.words()})"
            )
        return lines


def count_clips(number: int) -> str:
    return "1 clip" if number == 1 else f"{number} clips"


def yaml_text(finding: Finding) -> str:
    """A file that `--attention-backend-config` takes; what is not configuration is comment."""
    facts = finding.facts
    origin = [
        "ditattn tune",
        *finding.summary(),
        f"model: {facts['model']} ({facts['pipeline']}, {facts['dtype']}, {facts['device']['name']})",
        "call: " + ", ".join(f"{key}={value}" for key, value in facts["arguments"].items()),
        *(f"clip: {prompt} (seed {seed})" for prompt, seed in facts["clips"]),
        "versions: " + ", ".join(f"{key} {value}" for key, value in facts["versions"].items()),
    ]
    tried = [f"{candidate.words()}: {outcome.words()}" for candidate, outcome in finding.outcomes.items()]
    config = yaml.safe_dump(finding.setting.keys, sort_keys=False)
    return _comment(origin) + config + _comment(["tried:", *tried])


def _comment(lines: Sequence[str]) -> str:
    return "".join("# " + " ".join(line.split()) + "\n" for line in lines)
