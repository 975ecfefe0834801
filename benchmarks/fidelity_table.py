"""The lines of the laboratory of fidelity: on disk, as a table, and as a plot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ditattn.compare.charts import ticks
from ditattn.errors import ConfigError

Line = Mapping[str, Any]

QUESTION = ("method", "backend", "keys", "share", "prompt", "seed", "frames", "height", "width", "steps", "weights")
MEASURED = ("sparsity", "ran", "psnr", "ssim", "recall", "right", "dense_right")

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 190, 20, 48
LABEL_PX = 15
# of one curve after another
COLOURS = ("#2f6fde", "#d9730d", "#0f8a5f", "#c2334d", "#7a4fd0", "#0b8fa6", "#a3662b", "#5c8a14")


def question_of(line: Line) -> str:
    """What makes two lines the same measurement."""
    return json.dumps([line[name] for name in QUESTION], sort_keys=True)


def read_lines(file: Path) -> list[Line]:
    """Every line of a results file; none where there is no file.

    Raises:
        ConfigError: a line that is no measurement.
    """
    if not file.exists():
        return []
    lines = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            missing = [name for name in (*QUESTION, *MEASURED) if name not in line]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{file}, line {number} is no measurement ({error}): remove it, and it is made anew") from None
        if missing:
            raise ConfigError(f"{file}, line {number} lacks {', '.join(missing)}: remove it, and it is made anew")
        lines.append(line)
    return lines


def append_line(file: Path, line: Line) -> None:
    """Add one line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Row:
    """One method at one computed share, over its clips."""

    method: str
    share: float
    ran: float
    psnr: tuple[float, float]
    ssim: tuple[float, float]
    right: str
    recall: float


def rows(lines: Sequence[Line]) -> list[Row]:
    """Of PSNR and SSIM the median and the worst clip; rows by falling share, methods in the order in which they come."""
    parts: dict[tuple[float, str], list[Line]] = {}
    for line in lines:
        parts.setdefault((line["share"], line["method"]), []).append(line)
    return [_row(method, share, parts[share, method]) for share, method in sorted(parts, key=lambda part: -part[0])]


def _row(method: str, share: float, part: Sequence[Line]) -> Row:
    values = {name: [line[name] for line in part] for name in ("ran", "psnr", "ssim", "recall")}
    psnr, ssim = ((median(values[name]), min(values[name])) for name in ("psnr", "ssim"))
    return Row(method, share, fmean(values["ran"]), psnr, ssim, _right(part), fmean(values["recall"]))


def _right(part: Sequence[Line]) -> str:
    """Right clips of those that the judge can see and that are right where everything is computed."""
    judged = [line["right"] for line in part if line["dense_right"]]
    return f"{sum(judged)} of {len(judged)}" if judged else "-"


def table(lines: Sequence[Line]) -> str:
    """For people, and for pages."""
    heading = ("method", "share", "ran", "PSNR, dB", "worst", "SSIM", "worst", "right", "recall")
    cells = [heading, ("---",) * len(heading)]
    for row in rows(lines):
        numbers = (f"{row.share:.2f}", f"{row.ran:.3f}", *(f"{db:.1f}" for db in row.psnr), *(f"{value:.3f}" for value in row.ssim))
        cells.append((f"`{row.method}`", *numbers, row.right, f"{row.recall:.3f}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def draw(lines: Sequence[Line]) -> str:
    """PSNR against the computed share as SVG: a curve for each method, of the median clip, and dashed of the worst."""
    found = rows(lines)
    shares, decibels = [row.ran for row in found], [value for row in found for value in row.psnr]
    # a frame around one point has a width too
    x_low, x_high, y_low, y_high = min(shares) - 0.02, max(shares) + 0.02, min(decibels) - 1, max(decibels) + 1

    def place(share: float, psnr: float) -> tuple[float, float]:
        x = LEFT + (share - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return round(x, 1), round(TOP + (y_high - psnr) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for share in ticks(x_low, x_high):
        x, _ = place(share, y_low)
        parts.append(f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#f0f3f6"/>')
        parts.append(_text(x, HEIGHT - BOTTOM + 18, f"{share:g}", "middle"))
    for psnr in ticks(y_low, y_high):
        _, y = place(x_low, psnr)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#e8ecf0"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{psnr:g}", "end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "computed share of all query-key pairs, dense steps included", "middle"))
    parts.append(_text(LEFT + 6, TOP + 12, "PSNR against dense, dB; dashed: worst clip", "start"))
    for number, method in enumerate(dict.fromkeys(row.method for row in found)):
        parts += _curves(
            method, number, [(place(row.ran, row.psnr[0]), place(row.ran, row.psnr[1])) for row in found if row.method == method]
        )
    return "\n".join([*parts, "</svg>", ""])


def _curves(method: str, number: int, points: Sequence[tuple[tuple[float, float], tuple[float, float]]]) -> Iterator[str]:
    """Both curves of a method, and its name in the legend."""
    colour = COLOURS[number % len(COLOURS)]
    for curve, style in zip(zip(*points, strict=True), ("", ' stroke-dasharray="4 4" opacity="0.7"'), strict=True):
        path = " ".join(f"{x},{y}" for x, y in sorted(curve))
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{style}/>'
    yield from (f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for (x, y), _ in points)
    x, y = WIDTH - RIGHT + 14, TOP + 12 + number * LABEL_PX
    yield f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour}"/>'
    yield _text(x + 16, y, method, "start")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="#1d2530">{text}</text>'
