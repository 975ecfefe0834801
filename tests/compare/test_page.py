"""Numbers in words and in JSON, and the coordinates of the charts."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest

from ditattn.compare import charts, page
from ditattn.compare.charts import NARROW, WIDE, PlotPoint, heat_map, quality_plot, ticks
from ditattn.compare.record import plain


def spread(median: float, worst: float, best: float) -> dict[str, float]:
    return {"median": median, "worst": worst, "best": best}


def test_infinity_survives_json_and_reads_as_identical():
    content = {"psnr": math.inf, "frames": [30.0, math.inf], "cells": {1: (0.5,)}}
    read = json.loads(json.dumps(plain(content), allow_nan=False))
    assert read == {"psnr": "inf", "frames": [30.0, "inf"], "cells": {"1": [0.5]}}
    assert float(read["psnr"]) == math.inf
    assert [page.number(value) for value in (math.inf, 3.14159, None)] == ["identical", "3.14", "-"]


def point(label: str, group: int, speed: dict[str, float], psnr: dict[str, float]) -> PlotPoint:
    return PlotPoint(label, f"backend{group} sparsity={label}", group, speed, psnr)


def test_better_and_faster_is_up_and_to_the_right():
    plot = quality_plot(
        [
            point("slow", 0, spread(1.1, 1.0, 1.2), spread(40, 38, 42)),
            point("fast", 0, spread(1.8, 1.7, 1.9), spread(25, 22, 28)),
        ],
        target_psnr=30,
    )
    slow, fast = plot.dots
    assert slow.x < fast.x
    assert slow.y < fast.y
    assert plot.dense_x < slow.x
    assert fast.whisker_x[0] < fast.x < fast.whisker_x[1]
    assert fast.whisker_y[1] < fast.y < fast.whisker_y[0]
    assert slow.y < plot.target_y < fast.y
    assert fast.title == "backend0 sparsity=fast: 1.80x, 25.0 dB"
    # ticks lie where the values lie
    where = {text: pixel for pixel, text in plot.y_ticks}
    assert where["40"] == pytest.approx(slow.y)
    assert where["30"] == pytest.approx(plot.target_y)


def test_settings_of_one_backend_are_joined_from_slow_to_fast():
    places = [("b", 0, 1.5, 30), ("a", 0, 1.2, 35), ("c", 1, 1.4, 25), ("d", 0, 1.9, 20)]
    plot = quality_plot([point(name, group, spread(x, x, x), spread(y, y, y)) for name, group, x, y in places])
    b, a, _, d = plot.dots
    # one setting alone is no curve
    assert plot.curves == [(0, " ".join(f"{dot.x:.1f},{dot.y:.1f}" for dot in (a, b, d)))]


def test_a_line_joins_only_what_has_the_same_cache_beside_it():
    places = [("a", "", 1.2), ("a", "first_block", 1.5), ("b", "", 1.4), ("b", "first_block", 1.8), ("a", "sea", 1.3)]
    plot = quality_plot([replace(point(name, 0, spread(x, x, x), spread(30, 30, 30)), beside=beside) for name, beside, x in places])
    alone, cached = plot.dots[0:3:2], plot.dots[1:4:2]
    assert plot.curves == [(0, " ".join(f"{dot.x:.1f},{dot.y:.1f}" for dot in pair)) for pair in (alone, cached)]


def test_labels_lie_inside_and_hide_no_dot_and_no_other_label():
    near = [(1.5, 30.0), (1.5, 30.3), (1.52, 30.0), (1.9, 20.0), (1.1, 35.0)]
    for size in (WIDE, NARROW):
        plot = quality_plot([point("0.75", 0, spread(x, x, x), spread(y, y, y)) for x, y in near], size)
        boxes = [charts._box_of(dot.label, (dot.label_x, dot.label_y, dot.label_anchor)) for dot in plot.dots]
        for number, box in enumerate(boxes):
            assert all(charts._overlap(box, other) == 0 for other in boxes[:number])
            assert all(charts._overlap(box, (dot.x - 5, dot.y - 5, dot.x + 5, dot.y + 5)) == 0 for dot in plot.dots)
            assert box[0] > 0
            assert box[2] < size[0]


@pytest.mark.parametrize("size", [WIDE, NARROW])
@pytest.mark.parametrize("quality", [spread(math.inf, math.inf, math.inf), spread(math.inf, 30.0, math.inf), spread(30.0, 30.0, 30.0)])
def test_every_dot_lies_inside_the_plot(quality, size):
    plot = quality_plot([point("one", 0, spread(1.0, 1.0, 1.0), quality)], size)
    dot = plot.dots[0]
    assert all(0 <= x <= size[0] for x in (dot.x, *dot.whisker_x))
    assert all(0 <= y <= size[1] for y in (dot.y, *dot.whisker_y))


@pytest.mark.parametrize(("low", "high"), [(0.93, 1.07), (0, 1), (18.2, 43.9), (-3, 250)])
def test_ticks_are_few_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert low <= found[0] < found[-1] <= high


def test_heat_maps_have_a_cell_per_step_and_layer():
    cells = [[step, layer, layer / 4] for step in range(50) for layer in range(5)]
    found = heat_map("x", cells[:-1], "blue", largest=1.0)
    assert (found.steps, found.layers) == (50, 5)
    shown = [page_colour(found.pixels[layer, 0]) for layer in range(5)]
    assert shown[0] == found.first_colour
    assert shown[4] == found.last_colour
    assert len(set(shown)) == 5
    # what was not seen is clear
    assert found.pixels[4, 49, 3] == 0
    assert (found.pixels[:, :, 3] == 255).sum() == 249


def page_colour(pixel: np.ndarray) -> str:
    return "#" + "".join(f"{part:02x}" for part in pixel[:3])


def test_times_are_those_of_this_machines_clock(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        assert page.local_time("2026-11-26T20:49:11+00:00") == "2026-11-27 02:19"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_key_that_all_labels_share_is_named_once():
    rows = [page.Row(n, "a", label, "c0") for n, label in enumerate(("sparsity 0.5", "sparsity 0.75", "default settings"))]
    assert page._point_key(rows) == "sparsity"
    assert page._point_key([*rows, page.Row(3, "b", "threshold 0.9", "c1")]) is None
    assert page._point_key([page.Row(0, "a", "sparsity 0.5, min_tokens 0", "c0")]) is None
    assert page._point_key(rows[2:]) is None
    assert page._point_key([page.Row(0, "a", "+ first_block", "c0")]) is None


def test_differences_are_signed_and_odd_sizes_become_even():
    reference = np.full((2, 9, 11, 3), 100, np.uint8)
    frames = reference.copy()
    frames[0, 0, 0], frames[1, 1, 1] = 110, 0
    shown = page._difference(frames, reference)
    assert (shown[0, 0, 0, 0], shown[1, 1, 1, 0], shown[0, 5, 5, 0]) == (128 + 4 * 10, 0, 128)
    assert page._even(frames).shape == (2, 10, 12, 3)
    assert page._magnified(frames).shape[1] >= page.LEAST_HEIGHT
    # the browser magnifies strips; large frames become smaller ones
    assert page._strip(frames).shape == (9, 22, 3)
    assert page._strip(np.zeros((30, 256, 512, 3), np.uint8)).shape == (128, 6 * 256, 3)
