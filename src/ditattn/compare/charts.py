"""Coordinates of the page's charts. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["HeatMap", "Plot", "heat_map", "quality_plot", "ticks"]

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 20, 44

# pixels of a cell of a heat map: large ones for few steps, small ones for many
CELL_SIZES = (22, 7)
MAP_WIDTH = 440

# from nothing to all
RAMPS = {"blue": ((238, 243, 251), (22, 64, 138)), "red": ((253, 241, 238), (158, 22, 30))}


@dataclass(frozen=True)
class Point:
    """A setting in the plot, in pixels; `whisker_*` span worst to best."""

    name: str
    colour: str
    x: float
    y: float
    whisker_x: tuple[float, float]
    whisker_y: tuple[float, float]
    label: str
    label_left: bool


@dataclass(frozen=True)
class Plot:
    """Quality against speed.

    Attributes:
        x_ticks, y_ticks: (pixel, text).
        points: the settings.
        dense_x: where the speed of the reference is.
    """

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    points: list[Point]
    dense_x: float


@dataclass(frozen=True)
class HeatMap:
    """Cells of steps (across) and layers (down).

    Attributes:
        cells: (x, y, colour, text).
        steps, layers: how many.
        first_colour, last_colour, largest: of the scale.
    """

    title: str
    size: int
    width: int
    height: int
    cells: list[tuple[int, int, str, str]]
    steps: int
    layers: int
    first_colour: str
    last_colour: str
    largest: float


def quality_plot(points: Sequence[tuple[str, str, Mapping[str, Any], Mapping[str, Any]]]) -> Plot:
    """PSNR over speed-up.

    Args:
        points: (name, colour, spread of the speed-up, spread of the PSNR); an infinite PSNR stands above the scale.
    """
    speeds = [speed[key] for _, _, speed, _ in points for key in ("worst", "best")]
    finite = [psnr[key] for _, _, _, psnr in points for key in ("worst", "median", "best") if math.isfinite(psnr[key])]
    x_low, x_high = _around([1.0, *speeds], 0.08)
    y_low, y_high = _around(finite or [30.0], 0.15)

    def x_of(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        return TOP + (y_high - min(value, y_high)) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    drawn = []
    for name, colour, speed, psnr in points:
        x, y = x_of(speed["median"]), y_of(psnr["median"])
        quality = "identical" if math.isinf(psnr["median"]) else f"{psnr['median']:.1f} dB"
        drawn.append(
            Point(
                name,
                colour,
                x,
                y,
                (x_of(speed["worst"]), x_of(speed["best"])),
                (y_of(psnr["worst"]), y_of(psnr["best"])),
                f"{name}: {speed['median']:.2f}x, {quality}",
                x > WIDTH / 2,
            )
        )
    return Plot(
        *(WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM),
        [(x_of(value), f"{value:g}x") for value in ticks(x_low, x_high)],
        [(y_of(value), f"{value:g}") for value in ticks(y_low, y_high)],
        drawn,
        x_of(1.0),
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between `low` and `high`."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [round(n * step, 10) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def heat_map(title: str, cells: Sequence[Sequence[Any]], ramp: str, largest: float) -> HeatMap:
    """A map of [step, layer, value] cells; `largest` has the last colour of the ramp."""
    steps = 1 + max((step for step, _, _ in cells), default=0)
    layers = 1 + max((layer for _, layer, _ in cells), default=0)
    size = max(CELL_SIZES[1], min(CELL_SIZES[0], MAP_WIDTH // steps))
    drawn = [
        (step * size, layer * size, _colour(ramp, value / largest), f"step {step}, layer {layer}: {value:.3f}")
        for step, layer, value in cells
    ]
    return HeatMap(title, size, steps * size, layers * size, drawn, steps, layers, _colour(ramp, 0.0), _colour(ramp, 1.0), largest)


def _colour(ramp: str, share: float) -> str:
    first, last = RAMPS[ramp]
    return "#" + "".join(f"{round(a + (b - a) * min(max(share, 0.0), 1.0)):02x}" for a, b in zip(first, last, strict=True))


def _around(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = max((high - low) * margin, 0.02 * abs(high), 1e-6)
    return low - room, high + room
