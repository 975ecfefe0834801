"""The page: one HTML file with everything in it, made from a comparison's record and frames."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ditattn.compare.charts import HeatMap, Plot, heat_map, quality_plot
from ditattn.compare.measure import Comparison
from ditattn.compare.record import METRICS, plain

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

COLOURS = ("#2f6fde", "#d9730d", "#0f8a5f", "#c2334d", "#7a4fd0", "#0b8fa6", "#a3662b", "#5c8a14")


@dataclass(frozen=True)
class Picture:
    """A clip under one setting, ready for a browser.

    Attributes:
        name, colour: of the setting.
        kind: "video" or "image".
        source, difference: data addresses; the reference has no difference.
        numbers: of the clip, in words.
        strip, difference_strip: some frames side by side, as data addresses.
    """

    name: str
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
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, first=_first)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        record=record,
        metrics={name: METRICS[name] for name in METRICS if any(setting["statistics"][name] for setting in record["settings"])},
        colours=[COLOURS[n % len(COLOURS)] for n in range(len(record["settings"]))],
        plot=_plot(record),
        heat_maps=[_heat_maps(setting, _most_dropped(record)) for setting in record["settings"]],
        clips=[_pictures(comparison, record, n, encode) for n in range(len(comparison.clips))],
        gain=DIFFERENCE_GAIN,
        # "</" would end the script element that holds it
        json=json.dumps(plain(record), ensure_ascii=False, allow_nan=False).replace("</", "<\\/"),
    )


def number(value: float | None, digits: int = 2) -> str:
    """A number for people; infinity is what identical clips have."""
    if value is None:
        return "-"
    return "identical" if math.isinf(value) else f"{value:.{digits}f}"


def _first(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _plot(record: Mapping[str, Any]) -> Plot:
    points = []
    for position, setting in enumerate(record["settings"]):
        speed, psnr = setting["statistics"]["speed_up"], setting["statistics"]["psnr"]
        points.append((setting["name"], COLOURS[position % len(COLOURS)], speed, psnr))
    return quality_plot(points)


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


def _pictures(comparison: Comparison, record: Mapping[str, Any], clip: int, encode: Encode) -> list[Picture]:
    reference = comparison.reference[clip].runs[0].frames
    dense = record["reference"]["clips"][clip]
    pictures = [_picture("torch_sdpa, the reference", "#666", reference, None, f"{dense['total_ms'] / 1e3:.2f} s", encode)]
    for position, measured in enumerate(comparison.measured):
        setting = record["settings"][position]
        values = setting["clips"][clip]
        words = f"PSNR {number(values['psnr'])} dB · SSIM {number(values['ssim'], 3)} · {number(values['speed_up'])}x"
        pictures.append(
            _picture(setting["name"], COLOURS[position % len(COLOURS)], measured[clip].runs[0].frames, reference, words, encode)
        )
    return pictures


def _picture(name: str, colour: str, frames: Frames, reference: Frames | None, numbers: str, encode: Encode) -> Picture:
    difference = None if reference is None else _difference(frames, reference)
    return Picture(
        name=name,
        colour=colour,
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
    factor = max(1, math.ceil(LEAST_HEIGHT / frames.shape[1]))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def _even(frames: Frames) -> Frames:
    """Browsers play only h264 with halved colour, which needs even sizes: odd ones repeat their last row or column."""
    height, width = frames.shape[1:3]
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _strip(frames: Frames) -> Frames:
    """Evenly spaced frames side by side, `[STRIP_HEIGHT, W, 3]`."""
    from PIL import Image

    chosen = np.unique(np.linspace(0, len(frames) - 1, STRIP_FRAMES).round().astype(int))
    width = max(1, round(frames.shape[2] * STRIP_HEIGHT / frames.shape[1]))
    grows = frames.shape[1] < STRIP_HEIGHT
    filtering = Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS
    return np.concatenate([np.asarray(Image.fromarray(frames[n]).resize((width, STRIP_HEIGHT), filtering)) for n in chosen], axis=1)


def _png(pixels: Frames) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
