"""Runs of every setting over every clip, interleaved, each scored against the dense reference of its own clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from ditattn.backends.setting import Setting
from ditattn.compare.cache import ReferenceCache
from ditattn.compare.metrics import Scores, score
from ditattn.compare.run import Run, run_clip, warm_up
from ditattn.compare.setting import REFERENCE, REFERENCE_NAME, Clip, setting_names
from ditattn.compare.workload import Workload
from ditattn.progress import SILENT, Progress
from ditattn.runtime.probe import CellReading

__all__ = ["Comparison", "MeasuredClip", "References", "compare"]


@dataclass(frozen=True)
class MeasuredClip:
    """One clip under one setting.

    Attributes:
        clip: prompt and seed.
        runs: one or more, equal but for their times.
        scores: against the reference; None for the reference itself, and on all ranks but the first.
    """

    clip: Clip
    runs: list[Run]
    scores: Scores | None

    @property
    def total_ms(self) -> float:
        return median(run.total_ms for run in self.runs)

    @property
    def attention_ms(self) -> float:
        return median(run.attention_ms for run in self.runs)

    @property
    def peak_memory_mb(self) -> float | None:
        known = [run.peak_memory_mb for run in self.runs if run.peak_memory_mb is not None]
        return max(known, default=None)


@dataclass(frozen=True)
class Comparison:
    """Everything measured.

    Attributes:
        clips: in the order of every list below.
        reference: dense, clip by clip.
        settings: what was compared.
        measured: for each setting, clip by clip.
        readings: for each setting, what it would do to the calls of a dense run of the first clip; None if not probed.
    """

    clips: list[Clip]
    reference: list[MeasuredClip]
    settings: list[Setting]
    measured: list[list[MeasuredClip]]
    readings: list[list[CellReading]] | None = None

    @property
    def names(self) -> list[str]:
        """Of the settings, short and unlike one another."""
        return setting_names(self.settings)

    def speed_ups(self, number: int) -> list[float]:
        """Time of the reference over that of the setting, clip by clip."""
        return [dense.total_ms / run.total_ms for dense, run in zip(self.reference, self.measured[number], strict=True)]


@dataclass
class References:
    """Dense runs, from the cache where the very same run was made before.

    Attributes:
        cache: None makes every run anew and keeps none.
        facts: everything but the clip that can change a run.
    """

    workload: Workload
    cache: ReferenceCache | None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def find(self, clip: Clip) -> Run | None:
        """The cached run of a clip: of several ranks the first one's, whose machine may be another."""
        cache = self.cache
        return None if cache is None else self.workload.ranks.broadcast(lambda: cache.find(self._key(clip)))

    def make(self, clip: Clip) -> Run:
        """Run densely, and keep the run."""
        run = run_clip(self.workload, REFERENCE, clip)
        if self.cache and self.workload.ranks.is_first:
            self.cache.keep(self._key(clip), run)
        return run

    def _key(self, clip: Clip) -> dict[str, Any]:
        return {**self.facts, "prompt": clip.prompt, "seed": clip.seed}


def compare(
    references: References,
    settings: Sequence[Setting],
    clips: Sequence[Clip],
    *,
    repeats: int = 1,
    probe: bool = True,
    with_vmaf: bool = True,
    progress: Progress = SILENT,
) -> Comparison:
    """Measure settings against the dense reference.

    Args:
        references: the pipeline and its dense runs.
        settings, clips: what to compare, on what.
        repeats: runs of each setting and clip; times are their medians. A cached reference is one run.
        probe: also try the sparse settings on the attention calls of one dense run, which costs one run more.
        with_vmaf: measure VMAF where ffmpeg can.
        progress: hears what begins and ends.

    Clip by clip all settings run once, and the order rotates from clip to clip, so that a machine that becomes slower or faster meanwhile
    favours none of them. Several ranks make every run together and the first one scores it; times are its own.

    Raises:
        DitattnError: see `Workload.render`.
    """
    probe = probe and bool(settings)
    runs = _runs(references, settings, clips, repeats, int(probe), progress)
    readings = None
    if probe:
        progress.begin("probe: dropped softmax mass, on the calls of a dense run")
        readings = _probe(references.workload, settings, clips[0])
        progress.advance()
    progress.begin("metrics", counts=False)
    scored = references.workload.ranks.is_first
    reference = [MeasuredClip(clip, runs[0, number], None) for number, clip in enumerate(clips)]
    measured = [
        [
            MeasuredClip(
                clip,
                runs[which, number],
                score(runs[which, number][0].frames, runs[0, number][0].frames, with_vmaf=with_vmaf) if scored else None,
            )
            for number, clip in enumerate(clips)
        ]
        for which in range(1, 1 + len(settings))
    ]
    return Comparison(list(clips), reference, list(settings), measured, readings)


def _runs(
    references: References, settings: Sequence[Setting], clips: Sequence[Clip], repeats: int, num_more: int, progress: Progress
) -> dict[tuple[int, int], list[Run]]:
    """Runs by setting and clip, both numbered; setting 0 is the reference, which runs only for clips that the cache does not have.

    `num_more` runs are expected after these.
    """
    workload, names = references.workload, [REFERENCE_NAME, *setting_names(settings)]
    runs = {(0, number): [found] for number, clip in enumerate(clips) if (found := references.find(clip))}
    cached = set(runs)
    order = [turn for turn in _order(1 + len(settings), len(clips), repeats) if turn not in cached]
    progress.expect(len(order) + num_more)
    for which, setting in enumerate([REFERENCE, *settings]):
        if which > 0 or len(cached) < len(clips):
            progress.begin(f"warm up: {names[which]}", counts=False)
            warm_up(workload, setting, clips[0])
    for which, number in order:
        progress.begin(f"clip {number + 1} of {len(clips)}: {names[which]}")
        made = references.make(clips[number]) if which == 0 else run_clip(workload, settings[which - 1], clips[number])
        runs.setdefault((which, number), []).append(made)
        progress.advance()
    return runs


def _probe(workload: Workload, settings: Sequence[Setting], clip: Clip) -> list[list[CellReading]]:
    """The readings of each setting; settings with the same attention are tried once."""
    attention = [replace(setting, quantization=None, step_cache=None) for setting in settings]
    tried = [setting for number, setting in enumerate(attention) if setting not in attention[:number]]
    readings = workload.probe(tried, clip)
    return [readings[tried.index(setting)] for setting in attention]


def _order(num_settings: int, num_clips: int, repeats: int) -> list[tuple[int, int]]:
    """(setting, clip): all settings of a clip one after the other, begun with another one each time."""
    rounds = [(turn, clip) for turn, (_, clip) in enumerate((repeat, clip) for repeat in range(repeats) for clip in range(num_clips))]
    return [((turn + place) % num_settings, clip) for turn, clip in rounds for place in range(num_settings)]
