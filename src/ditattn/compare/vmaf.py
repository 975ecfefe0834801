"""VMAF, by the ffmpeg that imageio-ffmpeg brings, where it was built with libvmaf."""

from __future__ import annotations

import functools
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ditattn.packages import IMAGEIO

__all__ = ["measure_vmaf"]

Frames = np.ndarray[Any, Any]


def measure_vmaf(frames: Frames, reference: Frames) -> tuple[list[float] | None, str | None]:
    """VMAF of each frame of `[F, H, W, 3]` uint8, by the model built into libvmaf.

    Returns:
        (values, None), or (None, why it could not be measured).
    """
    if IMAGEIO.missing():
        return None, IMAGEIO.sentence()
    ffmpeg, has_vmaf = _ffmpeg()
    if not has_vmaf:
        return None, "the ffmpeg of imageio-ffmpeg was built without libvmaf"
    with tempfile.TemporaryDirectory(prefix="ditattn-vmaf-") as folder:
        place = Path(folder)
        (place / "distorted.rgb").write_bytes(np.ascontiguousarray(frames).tobytes())
        (place / "reference.rgb").write_bytes(np.ascontiguousarray(reference).tobytes())
        done = subprocess.run(_command(ffmpeg, *frames.shape[1:3]), cwd=place, capture_output=True, text=True)
        if done.returncode:
            return None, f"libvmaf failed: {' '.join(done.stderr.split())[-200:]}"
        content = json.loads((place / "vmaf.json").read_text(encoding="utf-8"))
    return [float(frame["metrics"]["vmaf"]) for frame in content["frames"]], None


def _command(ffmpeg: str, height: int, width: int) -> list[str]:
    raw = ["-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", f"{width}x{height}", "-framerate", "25"]
    # 4:4:4 keeps odd sizes; libvmaf reads the luma
    graph = "[0:v]format=yuv444p[a];[1:v]format=yuv444p[b];[a][b]libvmaf=log_fmt=json:log_path=vmaf.json"
    inputs = [*raw, "-i", "distorted.rgb", *raw, "-i", "reference.rgb"]
    return [ffmpeg, "-hide_banner", "-loglevel", "error", "-nostdin", *inputs, "-lavfi", graph, "-f", "null", "-"]


@functools.cache
def _ffmpeg() -> tuple[str, bool]:
    """Path of ffmpeg, and whether it has the filter."""
    import imageio_ffmpeg

    path = imageio_ffmpeg.get_ffmpeg_exe()
    filters = subprocess.run([path, "-hide_banner", "-filters"], capture_output=True, text=True).stdout
    return path, " libvmaf " in filters
