"""Numbers in words and in JSON, and the coordinates of the charts."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from ditattn.compare import page
from ditattn.compare.charts import HEIGHT, WIDTH, heat_map, quality_plot, ticks
from ditattn.compare.record import plain


def spread(median: float, worst: float, best: float) -> dict[str, float]:
    return {"median": median, "worst": worst, "best": best}


def test_infinity_survives_json_and_reads_as_identical():
    content = {"psnr": math.inf, "frames": [30.0, math.inf], "cells": {1: (0.5,)}}
    read = json.loads(json.dumps(plain(content), allow_nan=False))
    assert read == {"psnr": "inf", "frames": [30.0, "inf"], "cells": {"1": [0.5]}}
    assert float(read["psnr"]) == math.inf
    assert [page.number(value) for value in (math.inf, 3.14159, None)] == ["identical", "3.14", "-"]


def test_better_and_faster_is_up_and_to_the_right():
    plot = quality_plot(
        [("slow", "#000", spread(1.1, 1.0, 1.2), spread(40, 38, 42)), ("fast", "#111", spread(1.8, 1.7, 1.9), spread(25, 22, 28))]
    )
    slow, fast = plot.points
    assert slow.x < fast.x
    assert slow.y < fast.y
    assert plot.dense_x < slow.x
    assert fast.whisker_x[0] < fast.x < fast.whisker_x[1]
    assert fast.whisker_y[1] < fast.y < fast.whisker_y[0]
    assert fast.label_left
    assert not slow.label_left
    # ticks lie where the values lie
    where = {text: pixel for pixel, text in plot.y_ticks}
    assert where["40"] == pytest.approx(slow.y)


@pytest.mark.parametrize("quality", [spread(math.inf, math.inf, math.inf), spread(math.inf, 30.0, math.inf), spread(30.0, 30.0, 30.0)])
def test_every_point_lies_inside_the_plot(quality):
    plot = quality_plot([("one", "#000", spread(1.0, 1.0, 1.0), quality)])
    point = plot.points[0]
    assert all(0 <= x <= WIDTH for x in (point.x, *point.whisker_x))
    assert all(0 <= y <= HEIGHT for y in (point.y, *point.whisker_y))


@pytest.mark.parametrize(("low", "high"), [(0.93, 1.07), (0, 1), (18.2, 43.9), (-3, 250)])
def test_ticks_are_few_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert low <= found[0] < found[-1] <= high


def test_heat_maps_have_a_cell_per_step_and_layer():
    cells = [[step, layer, layer / 4] for step in range(50) for layer in range(5)]
    found = heat_map("x", cells, "blue", largest=1.0)
    assert (found.steps, found.layers, len(found.cells)) == (50, 5, 250)
    assert (found.width, found.height) == (50 * found.size, 5 * found.size)
    assert found.cells[0][2] == found.first_colour
    assert found.cells[4][2] == found.last_colour
    assert "step 0, layer 4: 1.000" in found.cells[4][3]


def test_differences_are_signed_and_odd_sizes_become_even():
    reference = np.full((2, 9, 11, 3), 100, np.uint8)
    frames = reference.copy()
    frames[0, 0, 0], frames[1, 1, 1] = 110, 0
    shown = page._difference(frames, reference)
    assert (shown[0, 0, 0, 0], shown[1, 1, 1, 0], shown[0, 5, 5, 0]) == (128 + 4 * 10, 0, 128)
    assert page._even(frames).shape == (2, 10, 12, 3)
    assert page._magnified(frames).shape[1] >= page.LEAST_HEIGHT
