"""Metrics against formulas written down a second time, in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("torchmetrics", reason="SSIM and MS-SSIM come from torchmetrics")

from ditattn.compare import metrics, vmaf
from ditattn.errors import ConfigError


def clip(seed: int, frames: int = 3, height: int = 64, width: int = 80) -> np.ndarray:
    """Smooth random colours, so that structure is there to be compared."""
    noise = np.random.default_rng(seed).normal(size=(frames, height + 8, width + 8, 3))
    smooth = sum(noise[:, y : y + height, x : x + width] for y in range(8) for x in range(8)) / 8
    return (128 + 60 * smooth).clip(0, 255).astype(np.uint8)


def disturbed(frames: np.ndarray, level: float, seed: int = 9) -> np.ndarray:
    return (frames + np.random.default_rng(seed).normal(scale=level, size=frames.shape)).clip(0, 255).astype(np.uint8)


def windowed(image: np.ndarray) -> np.ndarray:
    """Gaussian means of every 11 x 11 window that lies inside `[H, W]`."""
    weights = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights /= weights.sum()
    view = np.lib.stride_tricks.sliding_window_view(image, (11, 11))
    return np.einsum("yxij,i,j->yx", view, weights, weights)


def terms(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(SSIM map, contrast-structure map) of two `[H, W]` images in 0..1, at every pixel: the border is reflected."""
    a, b = np.pad(a, 5, mode="reflect"), np.pad(b, 5, mode="reflect")
    mean_a, mean_b = windowed(a), windowed(b)
    var_a, var_b = windowed(a * a) - mean_a**2, windowed(b * b) - mean_b**2
    covariance = windowed(a * b) - mean_a * mean_b
    structure = (2 * covariance + 0.03**2) / (var_a + var_b + 0.03**2)
    return structure * (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2), structure


def halved(image: np.ndarray) -> np.ndarray:
    height, width = (size // 2 * 2 for size in image.shape)
    return image[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3))


def own_ssim(frame: np.ndarray, other: np.ndarray) -> float:
    return float(np.mean([terms(frame[..., c] / 255, other[..., c] / 255)[0].mean() for c in range(3)]))


def own_ms_ssim(frame: np.ndarray, other: np.ndarray, weights: list[float]) -> float:
    pairs = [(frame[..., c] / 255, other[..., c] / 255) for c in range(3)]
    product = 1.0
    for scale, weight in enumerate(weights):
        maps = [terms(a, b) for a, b in pairs]
        last = scale == len(weights) - 1
        # structure counts where the window lies inside the frame
        product *= float(np.mean([full.mean() if last else structure[5:-5, 5:-5].mean() for full, structure in maps])) ** weight
        pairs = [(halved(a), halved(b)) for a, b in pairs]
    return product


@pytest.mark.parametrize("level", [2, 20])
def test_psnr_and_ssim_against_own_formulas(level):
    a = clip(0)
    b = disturbed(a, level)
    for frame, other, psnr, ssim in zip(a, b, metrics.frame_psnr(a, b), metrics.frame_ssim(a, b), strict=True):
        error = np.mean((frame.astype(float) - other.astype(float)) ** 2)
        assert psnr == pytest.approx(20 * math.log10(255) - 10 * math.log10(error), abs=1e-9)
        assert ssim == pytest.approx(own_ssim(frame, other), abs=2e-4)


@pytest.mark.parametrize(("height", "width", "scales"), [(64, 80, 3), (180, 200, 5), (24, 90, 2), (12, 12, 1)])
def test_ms_ssim_against_own_formula(height, width, scales):
    a = clip(1, 1, height, width)
    b = disturbed(a, 10)
    assert metrics.ms_ssim_scales(height, width) == scales
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    assert metrics.frame_ms_ssim(a, b)[0] == pytest.approx(own_ms_ssim(a[0], b[0], list(weights / weights.sum())), abs=2e-4)


def test_a_clip_is_pooled_so_that_one_identical_frame_does_not_make_it_infinite():
    a = clip(2)
    b = disturbed(a, 5)
    b[0] = a[0]
    scores = metrics.score(b, a, with_vmaf=False)
    assert scores.psnr_by_frame[0] == math.inf
    errors = [10 ** (-value / 10) for value in scores.psnr_by_frame]
    assert scores.psnr == pytest.approx(-10 * math.log10(sum(errors) / 3))
    assert scores.ssim == pytest.approx(np.mean(scores.ssim_by_frame))
    assert scores.not_measured == {"vmaf": "not asked for"}
    assert metrics.score(a, a, with_vmaf=False).psnr == math.inf


def test_flicker_sees_motion_and_not_the_picture():
    still = np.repeat(clip(3, 1), 4, axis=0)
    assert metrics.flicker(still) == 0
    shimmering = still.copy()
    shimmering[1::2] = np.clip(shimmering[1::2].astype(int) + 3, 0, 255)
    scores = metrics.score(shimmering, clip(4, 4), with_vmaf=False)
    assert scores.flicker == pytest.approx(3, abs=0.05)
    assert scores.flicker_ratio == pytest.approx(scores.flicker / scores.reference_flicker)
    assert metrics.score(shimmering, still, with_vmaf=False).flicker_ratio is None
    assert metrics.flicker(still[:1]) is None


def test_small_frames_and_other_shapes():
    tiny = clip(5, 2, 8, 8)
    scores = metrics.score(tiny, tiny, with_vmaf=False)
    assert (scores.ssim, scores.ms_ssim, scores.ms_ssim_scales) == (None, None, 0)
    assert "8 x 8" in scores.not_measured["ssim"]
    with pytest.raises(ConfigError, match="shape"):
        metrics.score(tiny, tiny[:1])


def test_vmaf_falls_with_noise_and_says_why_it_is_missing(monkeypatch):
    a = clip(6, 4, 63, 65)
    values, why_not = vmaf.measure_vmaf(disturbed(a, 3), a)
    if values is None:
        pytest.skip(f"VMAF: {why_not}")
    worse, _ = vmaf.measure_vmaf(disturbed(a, 40), a)
    assert len(values) == len(worse) == 4
    assert np.mean(values) > np.mean(worse) + 10
    assert vmaf.measure_vmaf(a[:1], a[:1])[0][0] > 90
    monkeypatch.setattr(vmaf, "_ffmpeg", lambda: ("ffmpeg", False))
    assert metrics.score(a, a).not_measured == {"vmaf": "the ffmpeg of imageio-ffmpeg was built without libvmaf"}
