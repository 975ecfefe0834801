"""What a search found, as a configuration file and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ditattn.backends.config import STEP_CACHE_KEY
from ditattn.backends.setting import Setting, StepCache
from ditattn.tune.candidate import Candidate, Outcome, Target

__all__ = ["Checked", "Finding", "alone_words", "count_clips", "yaml_text"]


@dataclass(frozen=True)
class Checked:
    """The result on clips that it was not tuned on.

    Attributes:
        num_clips: how many.
        psnr, ssim: of the worst one.
        speed_up, least_speed_up: median and worst, dense and sparse runs taking turns.
        meets: the target is met there too.
        cache_alone: the step cache with dense attention on the same clips; None without one.
    """

    num_clips: int
    psnr: float
    ssim: float | None
    speed_up: float
    least_speed_up: float
    meets: bool
    cache_alone: Checked | None = None

    @property
    def is_faster(self) -> bool:
        """Than dense, and than the step cache alone."""
        return self.speed_up > max(1.0, 0.0 if self.cache_alone is None else self.cache_alone.speed_up)

    def words(self, target: Target) -> str:
        return f"on {count_clips(self.num_clips)} it was not tuned on: {self.numbers(target)}"

    def numbers(self, target: Target) -> str:
        ssim = "" if self.ssim is None else f", SSIM {self.ssim:.4f}"
        verdict = "meets the target" if self.meets else f"misses the target by {max(target.psnr - self.psnr, 0):.2f} dB"
        if not self.meets and self.psnr >= target.psnr:
            verdict = "misses the target in SSIM"
        speed = f"{self.speed_up:.2f}x (worst {self.least_speed_up:.2f}x)"
        return f"worst PSNR {self.psnr:.2f} dB{ssim}, {speed}: {verdict}"


@dataclass(frozen=True)
class Finding:
    """Everything to be written down.

    Attributes:
        setting: to be used, with its step cache.
        best: the candidate in it.
        cache_alone: what the step cache does with dense attention; None without one.
        checked: None if the search was interrupted before.
        contradictions: pairs whose order the probe had wrong, of `pairs`.
    """

    setting: Setting
    best: Candidate
    target: Target
    outcomes: Mapping[Candidate, Outcome]
    facts: Mapping[str, Any]
    checked: Checked | None
    cache_alone: Outcome | None
    contradictions: Sequence[tuple[Candidate, Candidate]]
    pairs: int

    def summary(self) -> list[str]:
        """Lines for people."""
        found = self.outcomes[self.best]
        clips = len(self.facts["clips"])
        cache = self.setting.step_cache
        lines = [
            f"{self.setting.backend}: {self.best.words()}" + (f", beside the step cache {cache.words}" if cache is not None else ""),
            f"target: {self.target.words()}, on the worst clip",
            *([] if cache is None or self.cache_alone is None else [f"{alone_words(cache)}: {self.cache_alone.words()}"]),
            f"on the {count_clips(clips)} it was tuned on, after {len(self.outcomes)} runs: {found.words()}",
            *self._check(),
        ]
        if self.contradictions:
            expected, better = self.contradictions[0]
            count = f"in {len(self.contradictions)} of {self.pairs} pairs of runs"
            lines.append(
                f"the probe disagreed with the pixels {count}; it expected less damage of ({expected.words()}) than of ({better.words()})"
            )
        return lines

    def _check(self) -> list[str]:
        """How it did on other clips, and beside what."""
        if self.checked is None:
            return ["not checked on other clips"]
        lines, cache, alone = [self.checked.words(self.target)], self.setting.step_cache, self.checked.cache_alone
        if cache is not None and alone is not None:
            lines.append(f"there {alone_words(cache)}: {alone.numbers(self.target)}")
        if not self.checked.is_faster:
            than = "dense" if self.checked.speed_up <= 1 else "the step cache alone"
            lines.append(f"there it was not faster than {than}: on this machine nothing is gained by it")
        return lines


def alone_words(cache: StepCache) -> str:
    """What a step cache without sparse attention is called."""
    return f"{cache.words} alone, with dense attention"


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
    cache = finding.setting.step_cache
    keys = {**finding.setting.keys, **({} if cache is None else {STEP_CACHE_KEY: cache.as_dict()})}
    config = yaml.safe_dump(keys, sort_keys=False)
    return _comment(origin) + config + _comment(["tried:", *tried])


def _comment(lines: Sequence[str]) -> str:
    return "".join("# " + " ".join(line.split()) + "\n" for line in lines)
