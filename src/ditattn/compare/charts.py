"""Coordinates of the page's charts. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["NARROW", "WIDE", "HeatMap", "Plot", "PlotPoint", "heat_map", "quality_plot", "ticks"]

# pixels of the plot; a phone gets one of its own, since text that is scaled down cannot be read
WIDE, NARROW = (620, 450), (340, 320)
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 22, 46

# pixels: of a letter of a label, of a line of text, and around a dot
LETTER, LINE, DOT = 6.8, 14, 7

# pixels of a cell of a heat map: large ones for few steps, small ones for many
CELL_SIZES = (22, 5)
MAP_WIDTH = 440

# from nothing to all
RAMPS = {"blue": ((232, 239, 250), (22, 64, 138)), "red": ((253, 238, 234), (158, 22, 30))}

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class PlotPoint:
    """What is to be drawn: a setting.

    Attributes:
        label: beside the dot.
        name: in full.
        group: number of its backend.
        speed, psnr: spreads over the clips.
        beside: quantisation and step cache, in words; points of one group with the same ones are joined.
    """

    label: str
    name: str
    group: int
    speed: Mapping[str, Any]
    psnr: Mapping[str, Any]
    beside: str = ""


@dataclass(frozen=True)
class Dot:
    """A setting in the plot, in pixels; `whisker_*` span worst to best, `label_*` say where its label stands."""

    label: str
    title: str
    group: int
    x: float
    y: float
    whisker_x: tuple[float, float]
    whisker_y: tuple[float, float]
    label_x: float
    label_y: float
    label_anchor: str


@dataclass(frozen=True)
class Plot:
    """Quality against speed.

    Attributes:
        x_ticks, y_ticks: (pixel, text).
        dots: the settings.
        curves: (group, points of a polyline).
        dense_x: where the speed of the reference is.
        target_y: where the wanted quality is; None if none is wanted.
    """

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    dots: list[Dot]
    curves: list[tuple[int, str]]
    dense_x: float
    target_y: float | None


@dataclass(frozen=True)
class HeatMap:
    """A picture of steps (across) and layers (down).

    Attributes:
        pixels: `[layers, steps, 4]` uint8 with opacity; cells without a value are clear.
        size: pixels of a cell on the page.
        first_colour, last_colour, largest: of the scale.
    """

    title: str
    pixels: np.ndarray[Any, Any]
    size: int
    first_colour: str
    last_colour: str
    largest: float

    @property
    def layers(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def steps(self) -> int:
        return int(self.pixels.shape[1])


def quality_plot(points: Sequence[PlotPoint], size: tuple[int, int] = WIDE, target_psnr: float | None = None) -> Plot:
    """PSNR over speed-up; an infinite PSNR stands at the top of the scale."""
    width, height = size
    speeds = [point.speed[key] for point in points for key in ("worst", "best")]
    finite = [point.psnr[key] for point in points for key in ("worst", "median", "best") if math.isfinite(point.psnr[key])]
    x_low, x_high = _around([1.0, *speeds], 0.1)
    y_low, y_high = _around([*(finite or [30.0]), *([] if target_psnr is None else [target_psnr])], 0.15)

    def x_of(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (width - LEFT - RIGHT)

    def y_of(value: float) -> float:
        return TOP + (y_high - min(value, y_high)) / (y_high - y_low) * (height - TOP - BOTTOM)

    places = [(x_of(point.speed["median"]), y_of(point.psnr["median"])) for point in points]
    labels = _place_labels([point.label for point in points], places, (LEFT, TOP, width - RIGHT, height - BOTTOM))
    dots = []
    for point, (x, y), (label_x, label_y, anchor) in zip(points, places, labels, strict=True):
        quality = "identical" if math.isinf(point.psnr["median"]) else f"{point.psnr['median']:.1f} dB"
        dots.append(
            Dot(
                label=point.label,
                title=f"{point.name}: {point.speed['median']:.2f}x, {quality}",
                group=point.group,
                x=x,
                y=y,
                whisker_x=(x_of(point.speed["worst"]), x_of(point.speed["best"])),
                whisker_y=(y_of(point.psnr["worst"]), y_of(point.psnr["best"])),
                label_x=label_x,
                label_y=label_y,
                label_anchor=anchor,
            )
        )
    return Plot(
        *(width, height, LEFT, RIGHT, TOP, BOTTOM),
        [(x_of(value), f"{value:g}x") for value in ticks(x_low, x_high, width // 100)],
        [(y_of(value), f"{value:g}") for value in ticks(y_low, y_high)],
        dots,
        _curves(points, dots),
        x_of(1.0),
        None if target_psnr is None else y_of(target_psnr),
    )


def _curves(points: Sequence[PlotPoint], dots: Sequence[Dot]) -> list[tuple[int, str]]:
    """A line through the settings of every backend that has several with the same things beside it, from slow to fast."""
    lines: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for point, dot in zip(points, dots, strict=True):
        lines.setdefault((point.group, point.beside), []).append((dot.x, dot.y))
    return [(group, " ".join(f"{x:.1f},{y:.1f}" for x, y in sorted(line))) for (group, _), line in lines.items() if len(line) > 1]


def _place_labels(labels: Sequence[str], places: Sequence[tuple[float, float]], room: Box) -> list[tuple[float, float, str]]:
    """(x, y, anchor) of every label: the first place around its dot that hides nothing, or the one that hides least."""
    taken = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in places]
    found = []
    for label, (x, y) in zip(labels, places, strict=True):
        choices = [
            *((x + 9, y - 7, "start"), (x - 9, y + 17, "end"), (x - 9, y - 7, "end"), (x + 9, y + 17, "start")),
            *((x, y - 13, "middle"), (x, y + 23, "middle")),
        ]
        best = min(choices, key=lambda choice: _hidden(_box_of(label, choice), taken, room))
        taken.append(_box_of(label, best))
        found.append(best)
    return found


def _box_of(label: str, place: tuple[float, float, str]) -> Box:
    x, y, anchor = place
    length = LETTER * len(label)
    left = x - {"start": 0.0, "middle": length / 2, "end": length}[anchor]
    return left, y - LINE + 3, left + length, y + 3


def _hidden(box: Box, taken: Sequence[Box], room: Box) -> float:
    """Square pixels of what is under the box, and of what of the box is outside of the room."""
    own = (box[2] - box[0]) * (box[3] - box[1])
    return sum(_overlap(box, other) for other in taken) + 4 * (own - _overlap(box, room))


def _overlap(one: Box, other: Box) -> float:
    across, down = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    return max(across, 0.0) * max(down, 0.0)


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
    pixels = np.zeros((layers, steps, 4), np.uint8)
    for step, layer, value in cells:
        pixels[layer, step] = (*_colour(ramp, value / largest), 255)
    size = max(CELL_SIZES[1], min(CELL_SIZES[0], MAP_WIDTH // steps))
    return HeatMap(title, pixels, size, _hex(_colour(ramp, 0.0)), _hex(_colour(ramp, 1.0)), largest)


def _colour(ramp: str, share: float) -> tuple[int, int, int]:
    first, last = RAMPS[ramp]
    red, green, blue = (round(a + (b - a) * min(max(share, 0.0), 1.0)) for a, b in zip(first, last, strict=True))
    return red, green, blue


def _hex(colour: tuple[int, int, int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


def _around(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = max((high - low) * margin, 0.02 * abs(high), 1e-6)
    return low - room, high + room
