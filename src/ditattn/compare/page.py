"""The page: one HTML file with everything in it, made from a comparison's record and frames."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ditattn.compare.charts import NARROW, WIDE, HeatMap, Plot, PlotPoint, heat_map, quality_plot
from ditattn.compare.measure import Comparison
from ditattn.compare.record import METRICS, plain
from ditattn.compare.setting import setting_label

__all__ = ["DIFFERENCE_GAIN", "render_page"]

Frames = np.ndarray[Any, Any]
Encode = Callable[[Frames], bytes]

TEMPLATE = Path(__file__).with_name("page.html.j2")

DIFFERENCE_GAIN = 4
"""Differences are shown that many times as strong, on grey: grey is no difference."""

# pixels: smaller pictures are magnified by whole factors, so that browsers show them as they are
LEAST_HEIGHT = 192
STRIP_FRAMES = 6
STRIP_HEIGHT = 128

# of the page's style sheet, which has a light and a dark one of each
NUM_COLOURS = 8
REFERENCE_COLOUR = "dense"


@dataclass(frozen=True)
class Column:
    """A column of the table of numbers: a metric, its heading, digits, what to divide by; `minor` ones are shown on demand."""

    key: str
    heading: str
    digits: int
    divisor: float = 1
    minor: bool = False


COLUMNS = {
    "quality": (
        Column("psnr", "PSNR, dB", 2),
        Column("ssim", "SSIM", 4),
        Column("vmaf", "VMAF", 1),
        Column("ms_ssim", "MS-SSIM", 4, minor=True),
        Column("flicker_ratio", "flicker", 3, minor=True),
    ),
    "work": (
        Column("overall_density", "computed", 3),
        Column("sparse_density", "sparse calls", 3, minor=True),
        Column("attention_calls", "calls", 3),
        Column("peak_memory_mb", "memory, MiB", 0, minor=True),
    ),
    "time": (
        Column("attention_ms", "attention, s", 2, 1000),
        Column("total_ms", "all, s", 2, 1000),
        Column("speed_up", "speed-up", 2),
        Column("attention_speed_up", "attention speed-up", 2, minor=True),
    ),
}


@dataclass(frozen=True)
class Row:
    """A setting on the page: its number in the record, its backend, what tells it from others of that backend, and its colour class."""

    number: int
    backend: str
    label: str
    colour: str


@dataclass(frozen=True)
class Picture:
    """A clip under one setting, ready for a browser.

    Attributes:
        backend, label, colour: of the setting.
        kind: "video" or "image".
        source, difference: data addresses; the reference has no difference.
        numbers: of the clip, in words.
        strip, difference_strip: some frames side by side, as data addresses.
    """

    backend: str
    label: str
    colour: str
    kind: str
    source: str
    difference: str | None
    numbers: str
    strip: str
    difference_strip: str | None


def render_page(comparison: Comparison, record: Mapping[str, Any], encode: Encode) -> str:
    """The HTML text.

    Args:
        comparison: for its frames.
        record: of the same comparison; every number on the page comes from it.
        encode: `[F, H, W, 3]` uint8, F > 1, as the bytes of an mp4 file.
    """
    rows = _rows(record)
    return _template().render(
        record=record,
        rows=rows,
        groups=[(backend, list(group)) for backend, group in groupby(rows, key=lambda row: row.backend)],
        reference=_reference(record),
        columns=_columns(record),
        metrics=METRICS,
        target_psnr=record["target_psnr"],
        plots=[("wide", _plot(record, rows, WIDE)), ("narrow", _plot(record, rows, NARROW))],
        point_key=_point_key(rows),
        heat_maps=[_heat_maps(setting, _most_dropped(record)) for setting in record["settings"]],
        clips=[_pictures(comparison, record, rows, n, encode) for n in range(len(comparison.clips))],
        magnified=_factor(comparison.reference[0].runs[0].frames) > 1,
        gain=DIFFERENCE_GAIN,
        png=_png,
        # "</" would end the script element that holds it
        json=json.dumps(plain(record), ensure_ascii=False, allow_nan=False).replace("</", "<\\/"),
    )


@cache
def _template() -> Any:
    """Compiling it takes longer than rendering a page."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, first=_first, local_time=local_time)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def number(value: float | None, digits: int = 2) -> str:
    """A number for people; infinity is what identical clips have."""
    if value is None:
        return "-"
    return "identical" if math.isinf(value) else f"{value:.{digits}f}"


def local_time(stamp: str) -> str:
    """An ISO time as the clock of this machine shows it, to the minute."""
    return datetime.fromisoformat(stamp).astimezone().strftime("%Y-%m-%d %H:%M")


def _first(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _rows(record: Mapping[str, Any]) -> list[Row]:
    """The settings, those of a backend together."""
    backends = list(dict.fromkeys(setting["backend"] for setting in record["settings"]))
    rows = [
        Row(
            n,
            setting["backend"],
            setting_label(setting["name"]) or "default settings",
            f"c{backends.index(setting['backend']) % NUM_COLOURS}",
        )
        for n, setting in enumerate(record["settings"])
    ]
    return sorted(rows, key=lambda row: backends.index(row.backend))


def _columns(record: Mapping[str, Any]) -> dict[str, list[Column]]:
    """Those that something was measured for."""
    measured = {name for setting in record["settings"] for name, found in setting["statistics"].items() if found}
    return {group: [column for column in columns if column.key in measured] for group, columns in COLUMNS.items()}


def _reference(record: Mapping[str, Any]) -> dict[str, float]:
    """What the dense runs cost, medians over the clips."""
    clips = record["reference"]["clips"]
    memory = [clip["peak_memory_mb"] for clip in clips if clip["peak_memory_mb"] is not None]
    return {
        "overall_density": 1.0,
        "attention_calls": 1.0,
        "attention_ms": median(clip["attention_ms"] for clip in clips),
        "total_ms": median(clip["total_ms"] for clip in clips),
        "speed_up": 1.0,
        "attention_speed_up": 1.0,
        **({"peak_memory_mb": median(memory)} if memory else {}),
    }


def _point_key(rows: Sequence[Row]) -> str | None:
    """The one key that all labels are values of: it need not be said at every point. A quantisation or a cache is no key."""
    pairs = [row.label.split(" ") for row in rows if row.label != "default settings"]
    keys = {pair[0] for pair in pairs}
    return keys.pop() if len(keys) == 1 and all(len(pair) == 2 and pair[0] != "+" for pair in pairs) else None


def _plot(record: Mapping[str, Any], rows: Sequence[Row], size: tuple[int, int]) -> Plot:
    key, points = _point_key(rows), []
    for row in rows:
        setting = record["settings"][row.number]
        label = row.label.removeprefix(f"{key} ") if key else row.label
        # a backend alone is named by the legend
        label = "" if label == "default settings" else label
        statistics = setting["statistics"]
        beside = setting["name"].partition(" + ")[2]
        points.append(PlotPoint(label, setting["name"], int(row.colour[1:]), statistics["speed_up"], statistics["psnr"], beside))
    return quality_plot(points, size, record["target_psnr"])


def _most_dropped(record: Mapping[str, Any]) -> float:
    """Of all settings, so that their maps can be compared."""
    return max((one["dropped_mass"] for setting in record["settings"] for one in setting["probe"] or []), default=0.0)


def _heat_maps(setting: Mapping[str, Any], most_dropped: float) -> list[HeatMap]:
    maps = []
    for component, cells in setting["overall_density_by_step_and_layer"].items():
        maps.append(heat_map(f"overall density, {component}", cells, "blue", largest=1.0))
        seen = [one for one in setting["probe"] or [] if one["component"] == component]
        if seen and most_dropped:
            masses = [[one["step"], one["layer"], one["dropped_mass"]] for one in seen]
            maps.append(heat_map(f"dropped softmax mass, {component}", masses, "red", largest=most_dropped))
    return maps


def _pictures(comparison: Comparison, record: Mapping[str, Any], rows: Sequence[Row], clip: int, encode: Encode) -> list[Picture]:
    reference = comparison.reference[clip].runs[0].frames
    dense = record["reference"]["clips"][clip]
    dense_row = Row(-1, "torch_sdpa", "dense reference", REFERENCE_COLOUR)
    pictures = [_picture(dense_row, reference, None, f"{dense['total_ms'] / 1e3:.2f} s", encode)]
    for row in rows:
        values = record["settings"][row.number]["clips"][clip]
        quality = "identical" if math.isinf(values["psnr"]) else f"{number(values['psnr'])} dB"
        words = f"{quality} · {number(values['speed_up'])}x · {values['total_ms'] / 1e3:.2f} s"
        pictures.append(_picture(row, comparison.measured[row.number][clip].runs[0].frames, reference, words, encode))
    return pictures


def _picture(row: Row, frames: Frames, reference: Frames | None, numbers: str, encode: Encode) -> Picture:
    difference = None if reference is None else _difference(frames, reference)
    return Picture(
        backend=row.backend,
        label=row.label,
        colour=row.colour,
        kind="video" if len(frames) > 1 else "image",
        source=_address(frames, encode),
        difference=None if difference is None else _address(difference, encode),
        numbers=numbers,
        strip=_png(_strip(frames)),
        difference_strip=None if difference is None else _png(_strip(difference)),
    )


def _difference(frames: Frames, reference: Frames) -> Frames:
    signed = frames.astype(np.int16) - reference.astype(np.int16)
    shown: Frames = (128 + DIFFERENCE_GAIN * signed).clip(0, 255).astype(np.uint8)
    return shown


def _address(frames: Frames, encode: Encode) -> str:
    frames = _magnified(frames)
    if len(frames) == 1:
        return _png(frames[0])
    return "data:video/mp4;base64," + base64.b64encode(encode(_even(frames))).decode()


def _magnified(frames: Frames) -> Frames:
    return frames.repeat(_factor(frames), axis=1).repeat(_factor(frames), axis=2)


def _factor(frames: Frames) -> int:
    return max(1, math.ceil(LEAST_HEIGHT / frames.shape[1]))


def _even(frames: Frames) -> Frames:
    """Browsers play only h264 with halved colour, which needs even sizes: odd ones repeat their last row or column."""
    height, width = frames.shape[1:3]
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _strip(frames: Frames) -> Frames:
    """Evenly spaced frames side by side, `[height, W, 3]`, no higher than STRIP_HEIGHT."""
    from PIL import Image

    chosen = np.unique(np.linspace(0, len(frames) - 1, STRIP_FRAMES).round().astype(int))
    height = min(STRIP_HEIGHT, frames.shape[1])
    width = max(1, round(frames.shape[2] * height / frames.shape[1]))
    return np.concatenate(
        [np.asarray(Image.fromarray(frames[n]).resize((width, height), Image.Resampling.LANCZOS)) for n in chosen], axis=1
    )


def _png(pixels: Frames) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
