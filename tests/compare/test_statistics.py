"""Spreads against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ditattn.compare.statistics import spread


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10])
def test_quantiles_are_numpys(count):
    values = list(np.random.default_rng(count).normal(size=count))
    found = spread(values)
    assert found.median == pytest.approx(np.median(values))
    assert found.quartiles == pytest.approx(tuple(np.quantile(values, [0.25, 0.75])))
    assert (found.worst, found.best, found.count) == (min(values), max(values), count)
    assert spread(values, more_is_better=False).worst == max(values)


def test_identical_clips_and_missing_values():
    assert spread([math.inf, math.inf]).median == math.inf
    mixed = spread([math.inf, 30.0, None, 20.0])
    assert (mixed.median, mixed.worst, mixed.best, mixed.count) == (30.0, 20.0, math.inf, 3)
    assert mixed.quartiles == (25.0, math.inf)
    assert spread([None]) is None
