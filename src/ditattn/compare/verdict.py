"""What a comparison found, in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ditattn.backends.registry import load_backend
from ditattn.compare.setting import setting_label

__all__ = ["verdict"]

# more would be a list, not a sentence
NAMED_SETTINGS = 3


@dataclass(frozen=True)
class _Point:
    """A setting: decibels of its worst clip, its median speed-up, and whether a sparse backend left nothing out."""

    backend: str
    label: str
    psnr: float
    speed_up: float
    computed_all: bool

    @classmethod
    def of(cls, one: Mapping[str, Any]) -> _Point:
        """From the record of a setting."""
        statistics, backend = one["statistics"], one["backend"]
        density = statistics.get("overall_density")
        caching = one.get("step_cache") is not None
        computed_all = density is not None and density["median"] == 1 and not caching and load_backend(backend).is_sparse
        return cls(backend, setting_label(one["name"]), statistics["psnr"]["worst"], statistics["speed_up"]["median"], computed_all)

    @property
    def name(self) -> str:
        return f"{self.backend} ({self.label})" if self.label else self.backend

    def words(self) -> str:
        quality = "every pixel" if math.isinf(self.psnr) else f"{self.psnr:.1f} dB"
        return f"{quality} at {self.speed_up:.2f}x" + (" although nothing was left out" if self.computed_all else "")

    def is_beaten_by(self, other: _Point) -> bool:
        no_worse = other.psnr >= self.psnr and other.speed_up >= self.speed_up
        return no_worse and (other.psnr, other.speed_up) != (self.psnr, self.speed_up)


def verdict(settings: Sequence[Mapping[str, Any]], *, num_clips: int, target_psnr: float | None, random_weights: bool) -> str:
    """The sentence. Quality is that of a setting's worst clip, speed the median.

    Args:
        settings: as the record has them.
        num_clips: of each setting.
        target_psnr: decibels to keep; None names the best choices at every quality.
        random_weights: the model's pictures are noise, and their quality means nothing.
    """
    points = [_Point.of(one) for one in settings]
    fastest = max(points, key=lambda point: point.speed_up)
    if random_weights:
        return f"The model's weights are random, so quality means nothing; {fastest.name} is the fastest: {fastest.speed_up:.2f}x."
    ending = f", on the worst of {num_clips} clips." if num_clips > 1 else "."
    faster = [point for point in points if point.speed_up > 1]
    if not faster:
        return f"Nothing is faster than dense here; {fastest.name} comes nearest and keeps {fastest.words()}{ending}"
    if target_psnr is not None:
        return _against_target(faster, target_psnr) + ending
    return _best_choices(faster) + ending


def _against_target(faster: Sequence[_Point], target_psnr: float) -> str:
    meeting = [point for point in faster if point.psnr >= target_psnr]
    if not meeting:
        nearest = max(faster, key=lambda point: point.psnr)
        return f"Nothing that is faster than dense keeps {target_psnr:g} dB; {nearest.name} comes nearest: {nearest.words()}"
    best = max(meeting, key=lambda point: point.speed_up)
    return f"{best.name} is the fastest that keeps {target_psnr:g} dB: {best.words()}"


def _best_choices(faster: Sequence[_Point]) -> str:
    """Settings that no other one beats in both quality and speed, slow and careful ones first."""
    best = sorted((one for one in faster if not any(map(one.is_beaten_by, faster))), key=lambda point: point.speed_up)
    if len(best) > NAMED_SETTINGS:
        best = [best[0], _knee(best), best[-1]]
    return "; ".join(_keeps(backend, list(points)) for backend, points in groupby(best, key=lambda point: point.backend))


def _knee(best: Sequence[_Point]) -> _Point:
    """The inner one that stands highest above the straight line from the first to the last; of equal ones the middle."""
    first, last = best[0], best[-1]
    # lossless and equally fast ends have no line
    is_flat = math.isinf(first.psnr) or first.speed_up == last.speed_up
    slope = 0.0 if is_flat else (last.psnr - first.psnr) / (last.speed_up - first.speed_up)
    inner = sorted(best[1:-1], key=lambda point: abs(best.index(point) - len(best) // 2))
    return max(inner, key=lambda point: round(point.psnr - slope * point.speed_up, 3))


def _keeps(backend: str, points: Sequence[_Point]) -> str:
    """Of settings of one backend; a key that was named at the first of them is not named again."""
    words, named = [], ""
    for point in points:
        key = point.label.partition(" ")[0]
        label = point.label.removeprefix(f"{key} ") if key == named else point.label
        words.append(point.words() + (f" ({label})" if label else ""))
        named = key
    return f"{backend} keeps " + (", ".join(words[:-1]) + " and " if len(words) > 1 else "") + words[-1]
