"""A comparison as plain values: what the JSON file holds and what the page and the table are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ditattn.compare.measure import Comparison, MeasuredClip
from ditattn.compare.statistics import spread
from ditattn.compare.verdict import verdict
from ditattn.runtime.probe import CellReading

__all__ = ["METRICS", "comparison_record", "plain"]

# name in the record: (unit, more is better, what it is)
METRICS: dict[str, tuple[str, bool, str]] = {
    "psnr": ("dB", True, "peak signal-to-noise ratio of the clip's mean squared error"),
    "ssim": ("", True, "structural similarity, mean over the frames"),
    "ms_ssim": ("", True, "SSIM in several scales, mean over the frames"),
    "vmaf": ("", True, "Netflix's video quality metric, 0 to 100, mean over the frames"),
    "flicker_ratio": ("x", False, "mean change from frame to frame over that of the reference"),
    "overall_density": (
        "",
        False,
        "share of the query-key pairs of self-attention that was computed: all calls that ran, a dense one as 1",
    ),
    "sparse_density": ("", False, "the same over the calls that ran sparse alone"),
    "attention_calls": ("", False, "calls of self-attention that ran, over the reference's: a step cache leaves some out"),
    "attention_ms": ("ms", False, "time in self-attention, token order and block selection included"),
    "total_ms": ("ms", False, "time of the whole call"),
    "attention_speed_up": ("x", True, "time in attention of the reference over the setting's"),
    "speed_up": ("x", True, "time of the reference over the setting's"),
    "peak_memory_mb": ("MiB", False, "most memory at once"),
}


def comparison_record(comparison: Comparison, about: Mapping[str, Any], target_psnr: float | None = None) -> dict[str, Any]:
    """Everything of a comparison but the pixels.

    Args:
        comparison: what was measured.
        about: model, device, versions and settings, as plain values.
        target_psnr: decibels that the user wants to keep.
    """
    settings = [_setting(comparison, number) for number in range(len(comparison.settings))]
    num_clips, random_weights = len(comparison.clips), bool(about.get("model", {}).get("random_weights"))
    return {
        **about,
        "target_psnr": target_psnr,
        "verdict": verdict(settings, num_clips=num_clips, target_psnr=target_psnr, random_weights=random_weights),
        "metrics": {name: {"unit": unit, "more_is_better": more, "is": what} for name, (unit, more, what) in METRICS.items()},
        "clips": [asdict(clip) for clip in comparison.clips],
        "reference": {"name": "torch_sdpa", "clips": [_costs(one) for one in comparison.reference]},
        "settings": settings,
        "not_measured": {key: value for setting in settings for one in setting["clips"] for key, value in one["not_measured"].items()},
    }


def _setting(comparison: Comparison, number: int) -> dict[str, Any]:
    setting, measured = comparison.settings[number], comparison.measured[number]
    caching = any(other.step_cache is not None for other in comparison.settings)
    clips = [_clip(one, dense, caching) for one, dense in zip(measured, comparison.reference, strict=True)]
    return {
        "name": comparison.names[number],
        "backend": setting.backend,
        "config": setting.keys,
        "components": dict(setting.components),
        "quantization": None if setting.quantization is None else setting.quantization.name,
        "step_cache": None if setting.step_cache is None else asdict(setting.step_cache),
        "statistics": {name: _spread([clip[name] for clip in clips], METRICS[name][1]) for name in METRICS},
        "clips": clips,
        "overall_density_by_step_and_layer": _mean_cells([one.runs[0].densities for one in measured]),
        "probe": None if comparison.readings is None else _probe(comparison.readings[number]),
    }


def _clip(one: MeasuredClip, dense: MeasuredClip, caching: bool) -> dict[str, Any]:
    """`caching`: some setting has a step cache. Without one all calls run, and a column of ones would say nothing."""
    assert one.scores is not None
    scores, dense_calls = vars(one.scores), dense.runs[0].attention_calls
    return {
        **scores,
        "flicker_ratio": one.scores.flicker_ratio,
        "overall_density": one.runs[0].overall_density,
        "sparse_density": one.runs[0].sparse_density,
        "attention_calls": one.runs[0].attention_calls / dense_calls if caching and dense_calls else None,
        **_costs(one),
        "speed_up": dense.total_ms / one.total_ms,
        "attention_speed_up": dense.attention_ms / one.attention_ms if one.attention_ms else None,
    }


def _costs(one: MeasuredClip) -> dict[str, Any]:
    first = one.runs[0]
    return {
        "total_ms": one.total_ms,
        "total_ms_of_each_run": [run.total_ms for run in one.runs],
        "attention_ms": one.attention_ms,
        "stages_ms": first.stages_ms,
        "steps_ms": first.steps_ms,
        "peak_memory_mb": one.peak_memory_mb,
        "memory_counts": first.memory_counts,
        "measured_at": first.measured_at,
        "cached": first.cached,
        "attention": first.attention,
        "quantization": first.quantization,
    }


def _spread(values: Sequence[float | None], more_is_better: bool) -> dict[str, Any] | None:
    found = spread(values, more_is_better=more_is_better)
    return None if found is None else asdict(found)


def _mean_cells(runs: Sequence[Mapping[str, Sequence[Sequence[Any]]]]) -> dict[str, list[list[Any]]]:
    """By component [step, layer, mean share over the clips]."""
    sums: dict[str, dict[tuple[int, int], list[float]]] = {}
    for run in runs:
        for component, cells in run.items():
            for step, layer, share in cells:
                sums.setdefault(component, {}).setdefault((step, layer), []).append(share)
    return {name: [[*place, math.fsum(all_) / len(all_)] for place, all_ in sorted(cells.items())] for name, cells in sums.items()}


def _probe(readings: Sequence[CellReading]) -> list[dict[str, Any]]:
    return [asdict(one) for one in readings]


def plain(value: Any) -> Any:
    """The value with infinite numbers as the text "inf", which JSON lacks; float("inf") reads it back."""
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
