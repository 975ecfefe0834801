"""A candidate on a real pipeline: its pixels and its time against the dense references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, median

from ditattn.backends.setting import Setting
from ditattn.compare.measure import Comparison, References, compare
from ditattn.compare.metrics import frame_ssim, pooled_psnr
from ditattn.compare.run import Run, run_clip, warm_up
from ditattn.compare.setting import REFERENCE, Clip
from ditattn.runtime.probe import CellReading
from ditattn.tune.candidate import Candidate, Outcome, Target
from ditattn.tune.result import Checked
from ditattn.tune.sensitivity import PROBED_SPARSITIES

__all__ = ["Objective", "check", "probe"]


@dataclass
class Objective:
    """Evaluates candidates on clips. Of several ranks the first one's clock and pixels decide.

    Attributes:
        references: the pipeline and its dense runs, which no step cache shortens.
        setting: backend, fixed keys of its configuration, other backends for components, the step cache of every candidate.
        clips: of the target; the one that missed last is run first, since it decides soonest.
    """

    references: References
    setting: Setting
    clips: list[Clip]
    target: Target

    def prepare(self, *, anew: bool) -> float:
        """Make the dense runs (with `anew` even those that are in the cache, since their times are of another moment) and warm up.

        Returns:
            The share of the dense time that is self-attention.
        """
        warm_up(self.references.workload, REFERENCE, self.clips[0])
        self._dense: dict[Clip, Run] = {}
        for clip in self.clips:
            found = None if anew else self.references.find(clip)
            self._dense[clip] = found or self.references.make(clip)
        warm_up(self.references.workload, self.setting, self.clips[0])
        return self._attention_share(list(self._dense.values()))

    @property
    def num_steps(self) -> int | None:
        """Steps of the dense runs; None if they were counted in none."""
        steps = {step for run in self._dense.values() for cells in run.densities.values() for step, _, _ in cells}
        return 1 + max(steps) if steps else None

    def __call__(self, candidate: Candidate) -> Outcome:
        return self._outcome(self.setting.with_keys(**candidate.keys))[0]

    def step_cache_alone(self) -> tuple[Outcome, float]:
        """What the step cache does beside dense attention, and the share of that time that is self-attention."""
        outcome, runs = self._outcome(replace(REFERENCE, step_cache=self.setting.step_cache))
        return outcome, self._attention_share(runs)

    def _attention_share(self, runs: Sequence[Run]) -> float:
        return self.references.workload.ranks.broadcast(lambda: fmean(run.attention_ms / run.total_ms for run in runs))

    def _outcome(self, setting: Setting) -> tuple[Outcome, list[Run]]:
        """And the runs, of which the last one may have missed the target."""
        psnr, ssim, shares, runs = float("inf"), None if self.target.ssim is None else 1.0, [], []
        for clip in list(self.clips):
            run = run_clip(self.references.workload, setting, clip)
            clip_psnr, clip_ssim, share = self.references.workload.ranks.broadcast(partial(self._judged, run, self._dense[clip]))
            psnr, ssim = min(psnr, clip_psnr), None if ssim is None else min(ssim, clip_ssim)
            shares.append(share)
            runs.append(run)
            if not self.target.met_by(psnr, ssim):
                self.clips.remove(clip)
                self.clips.insert(0, clip)
                break
        return Outcome(psnr, ssim, median(shares), self.target.met_by(psnr, ssim)), runs

    def _judged(self, run: Run, dense: Run) -> tuple[float, float, float]:
        """PSNR, SSIM (1 where the target has none) and share of the dense time."""
        ssim = 1.0 if self.target.ssim is None else fmean(frame_ssim(run.frames, dense.frames))
        return pooled_psnr(run.frames, dense.frames), ssim, run.total_ms / dense.total_ms


def probe(references: References, setting: Setting, clip: Clip) -> dict[float, list[CellReading]]:
    """Readings by sparsity, of one dense run; every step and layer is tried that the setting's step cache lets run."""
    everywhere = setting.with_keys(skip_first_steps=0, skip_last_steps=0, skip_layers="")
    settings = [everywhere.with_keys(sparsity=sparsity) for sparsity in PROBED_SPARSITIES]
    found = references.workload.probe(settings, clip)
    return dict(zip(PROBED_SPARSITIES, found, strict=True))


def check(references: References, setting: Setting, clips: Sequence[Clip], target: Target) -> Checked:
    """A setting, and its step cache alone, on clips that it was not tuned on: dense runs and theirs taking turns."""
    fresh = References(references.workload, None)
    alone = [] if setting.step_cache is None else [replace(REFERENCE, step_cache=setting.step_cache)]
    found = compare(fresh, [setting, *alone], clips, probe=False, with_vmaf=False)
    return references.workload.ranks.broadcast(lambda: _checked(found, target))


def _checked(found: Comparison, target: Target) -> Checked:
    setting, *alone = (_checked_one(found, number, target) for number in range(len(found.settings)))
    return replace(setting, cache_alone=alone[0]) if alone else setting


def _checked_one(found: Comparison, number: int, target: Target) -> Checked:
    scores = [one.scores for one in found.measured[number] if one.scores is not None]
    ssims = [one.ssim for one in scores if one.ssim is not None]
    psnr, ssim = min(one.psnr for one in scores), min(ssims) if target.ssim is not None and ssims else None
    speed_ups = found.speed_ups(number)
    return Checked(len(found.clips), psnr, ssim, median(speed_ups), min(speed_ups), target.met_by(psnr, ssim))
