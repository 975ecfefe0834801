"""The first sentence of a comparison."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ditattn.compare.verdict import verdict


def setting(name: str, psnr: float, speed_up: float) -> dict[str, Any]:
    # the median of the quality is better than its worst, which counts
    return {
        "name": name,
        "backend": name.partition(" ")[0],
        "statistics": {"psnr": {"median": psnr + 5, "worst": psnr}, "speed_up": {"median": speed_up, "worst": 0.1}},
    }


A = [setting("a sparsity=0.5", 35.6, 1.3), setting("a sparsity=0.75", 28.4, 1.5), setting("a sparsity=0.9", 23.3, 1.7)]
B = [setting("b sparsity=0.5", 30.2, 1.31), setting("b sparsity=0.9", 21.0, 1.6)]


def sentence(settings: list[dict[str, Any]], target_psnr: float | None = None, num_clips: int = 1, random_weights: bool = False) -> str:
    return verdict(settings, num_clips=num_clips, target_psnr=target_psnr, random_weights=random_weights)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (A, "a keeps 35.6 dB at 1.30x (sparsity 0.5), 28.4 dB at 1.50x (0.75) and 23.3 dB at 1.70x (0.9)."),
        # b at 0.9 is slower and worse than a at 0.9: it is no choice
        (A[2:] + B, "b keeps 30.2 dB at 1.31x (sparsity 0.5); a keeps 23.3 dB at 1.70x (sparsity 0.9)."),
        ([setting("fa", math.inf, 1.1)], "fa keeps every pixel at 1.10x."),
        ([setting("a sparsity=0.5,min_tokens=0", 30.0, 1.1)], "a keeps 30.0 dB at 1.10x (sparsity 0.5, min_tokens 0)."),
        (
            [setting("a", 30.0, 0.9), setting("b", 20.0, 0.95)],
            "Nothing is faster than dense here; b comes nearest and keeps 20.0 dB at 0.95x.",
        ),
        # equal ones do not beat each other
        ([setting("a", 30.0, 1.1), setting("b", 30.0, 1.1)], "a keeps 30.0 dB at 1.10x; b keeps 30.0 dB at 1.10x."),
    ],
)
def test_what_no_other_setting_beats_is_named(settings: list[dict[str, Any]], expected: str) -> None:
    assert sentence(settings) == expected


def test_of_many_choices_the_ends_and_the_middle_are_named() -> None:
    many = [setting(f"a sparsity={n}", 50 - n, 1.1 + n / 10) for n in range(5)]
    assert sentence(many) == "a keeps 50.0 dB at 1.10x (sparsity 0), 48.0 dB at 1.30x (2) and 46.0 dB at 1.50x (4)."


def test_of_many_choices_the_one_above_the_line_between_the_ends_is_named() -> None:
    # as measured: the middle one by speed loses 5 dB for 4 %
    a = [setting("a sparsity=0.5", 36.6, 1.88), setting("a sparsity=0.75", 29.5, 2.09), setting("a sparsity=0.9", 23.7, 2.21)]
    b = [setting("b sparsity=0.75", 24.4, 2.17), setting("b sparsity=0.9", 21.8, 2.32)]
    expected = "a keeps 36.6 dB at 1.88x (sparsity 0.5) and 29.5 dB at 2.09x (0.75); b keeps 21.8 dB at 2.32x (sparsity 0.9)."
    assert sentence(a + b) == expected


@pytest.mark.parametrize("psnr", [30.0, math.inf])
def test_many_equal_choices_are_named(psnr: float) -> None:
    assert sentence([setting(name, psnr, 1.5) for name in "abcde"]).count("keeps") == 3


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (30, "b (sparsity 0.5) is the fastest that keeps 30 dB: 30.2 dB at 1.31x."),
        (31, "a (sparsity 0.5) is the fastest that keeps 31 dB: 35.6 dB at 1.30x."),
        (40, "Nothing that is faster than dense keeps 40 dB; a (sparsity 0.5) comes nearest: 35.6 dB at 1.30x."),
    ],
)
def test_a_target_names_the_fastest_that_keeps_it(target: float, expected: str) -> None:
    assert sentence(A + B, target) == expected


def test_the_worst_of_several_clips_counts_and_is_said() -> None:
    assert sentence(A[:1], 30, num_clips=3).endswith("35.6 dB at 1.30x, on the worst of 3 clips.")


def test_noise_has_no_quality() -> None:
    assert sentence(A, 30, random_weights=True) == (
        "The model's weights are random, so quality means nothing; a (sparsity 0.9) is the fastest: 1.70x."
    )


def test_a_sparse_backend_that_ran_densely_is_said_to() -> None:
    """Its times differ from dense by chance alone."""
    one = setting("rain_fusion_attn sparsity=0.5", 46, 1.2)
    one["statistics"]["overall_density"] = {"median": 1.0, "worst": 1.0}
    assert "46.0 dB at 1.20x although nothing was left out" in sentence([one])
    assert "although" not in sentence([setting("laser_attn", 46, 1.2)])
