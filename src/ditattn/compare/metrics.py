"""How far frames are from reference frames."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditattn.compare.vmaf import measure_vmaf
from ditattn.errors import BackendUnavailable, ConfigError
from ditattn.packages import TORCHMETRICS

__all__ = ["Scores", "flicker", "frame_ms_ssim", "frame_psnr", "frame_ssim", "ms_ssim_scales", "pooled_psnr", "score"]

Frames = np.ndarray[Any, Any]

WINDOW = 11
"""Pixels of the Gaussian window of SSIM (sigma 1.5), as Wang et al. 2004 have it."""

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the five scales of Wang et al. 2003. Frames too small for five scales use the first ones, their weights scaled to sum to 1."""


@dataclass(frozen=True)
class Scores:
    """One clip against its reference.

    Attributes:
        psnr: decibels, of the mean squared error of the whole clip (one identical frame does not make it infinite); inf if identical.
        ssim, ms_ssim: means over the frames; None where the frames are smaller than the window.
        ms_ssim_scales: how many scales the size of the frames allows.
        vmaf: mean over the frames, 0..100; None where it was not measured.
        flicker, reference_flicker: mean absolute change from frame to frame, in levels of 255; None for an image.
        psnr_by_frame, ssim_by_frame, ms_ssim_by_frame, vmaf_by_frame: the same, frame by frame.
        not_measured: metrics that are missing, and why.
    """

    psnr: float
    ssim: float | None
    ms_ssim: float | None
    ms_ssim_scales: int
    vmaf: float | None
    flicker: float | None
    reference_flicker: float | None
    psnr_by_frame: list[float]
    ssim_by_frame: list[float] | None
    ms_ssim_by_frame: list[float] | None
    vmaf_by_frame: list[float] | None
    not_measured: dict[str, str]

    @property
    def flicker_ratio(self) -> float | None:
        """Flicker against the reference's; None for images and still references."""
        return self.flicker / self.reference_flicker if self.flicker is not None and self.reference_flicker else None


def score(frames: Frames, reference: Frames, *, with_vmaf: bool = True) -> Scores:
    """Every metric of `[F, H, W, 3]` uint8 frames against reference frames of the same shape.

    Raises:
        ConfigError: the shapes differ.
        BackendUnavailable: torchmetrics is missing.
    """
    if frames.shape != reference.shape:
        raise ConfigError(f"cannot compare frames of shape {list(frames.shape)} with a reference of shape {list(reference.shape)}")
    height, width = frames.shape[1:3]
    scales = ms_ssim_scales(height, width)
    too_small = None if scales else f"frames of {height} x {width} are smaller than SSIM's window of {WINDOW} x {WINDOW}"
    not_measured = {name: too_small for name in ("ssim", "ms_ssim") if too_small}
    ssim = frame_ssim(frames, reference) if scales else None
    ms_ssim = frame_ms_ssim(frames, reference) if scales else None
    vmaf, why_not = measure_vmaf(frames, reference) if with_vmaf else (None, "not asked for")
    if why_not:
        not_measured["vmaf"] = why_not
    return Scores(
        psnr=pooled_psnr(frames, reference),
        ssim=_mean(ssim),
        ms_ssim=_mean(ms_ssim),
        ms_ssim_scales=scales,
        vmaf=_mean(vmaf),
        flicker=flicker(frames),
        reference_flicker=flicker(reference),
        psnr_by_frame=frame_psnr(frames, reference),
        ssim_by_frame=ssim,
        ms_ssim_by_frame=ms_ssim,
        vmaf_by_frame=vmaf,
        not_measured=not_measured,
    )


def frame_psnr(frames: Frames, reference: Frames) -> list[float]:
    """Decibels of each frame; inf where it is identical."""
    return [pooled_psnr(frame, other) for frame, other in zip(frames, reference, strict=True)]


def pooled_psnr(frames: Frames, reference: Frames) -> float:
    """Decibels of the mean squared error over all pixels, for a peak of 255."""
    squared_error = float(np.square(frames.astype(np.float64) - reference.astype(np.float64)).mean())
    return math.inf if squared_error == 0 else 10 * math.log10(255**2 / squared_error)


def flicker(frames: Frames) -> float | None:
    """Mean absolute change from frame to frame, in levels of 255; None for an image."""
    if len(frames) < 2:
        return None
    return float(np.mean([np.abs(b.astype(np.int16) - a.astype(np.int16)).mean() for a, b in itertools.pairwise(frames)]))


def frame_ssim(frames: Frames, reference: Frames) -> list[float]:
    """SSIM of each frame, mean over the colour channels (Gaussian window of 11 x 11, sigma 1.5, reflected at the border)."""
    _need_torchmetrics()
    from torchmetrics.functional.image import structural_similarity_index_measure

    return [
        float(structural_similarity_index_measure(*_as_images(frame, other), data_range=1.0))
        for frame, other in zip(frames, reference, strict=True)
    ]


def frame_ms_ssim(frames: Frames, reference: Frames) -> list[float]:
    """MS-SSIM of each frame, in as many scales as its size allows."""
    _need_torchmetrics()
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    weights = MS_SSIM_WEIGHTS[: ms_ssim_scales(*frames.shape[1:3])]
    betas = tuple(weight / sum(weights) for weight in weights)
    return [
        float(multiscale_structural_similarity_index_measure(*_as_images(frame, other), data_range=1.0, betas=betas))
        for frame, other in zip(frames, reference, strict=True)
    ]


def ms_ssim_scales(height: int, width: int) -> int:
    """Scales of MS-SSIM that frames of this size allow: the smallest must still be larger than the window. 0 if there is none."""
    # the second divisor is torchmetrics' own demand
    fits = [n for n in range(1, 6) if min(height, width) // max(2 ** (n - 1), (n - 1) ** 2) >= WINDOW]
    return max(fits, default=0)


def _as_images(*frames: Frames) -> list[Tensor]:
    """`[H, W, 3]` uint8 as `[1, 3, H, W]` float32 in 0..1."""
    return [torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1).unsqueeze(0).float() / 255 for frame in frames]


def _mean(values: list[float] | None) -> float | None:
    return None if values is None else math.fsum(values) / len(values)


def _need_torchmetrics() -> None:
    if TORCHMETRICS.missing():
        raise BackendUnavailable(TORCHMETRICS.sentence())
