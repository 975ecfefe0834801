"""What is read of sglang's requests: the grids of latents in all its forms, and what stands beside them in a call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ditattn.hosts.sglang.sequences import Latents, call_tokens, latents_of, sequence_of
from ditattn.plan.split import GatheredTokens


def latents(prefix: str, shape: tuple[int, ...], patch_size: Any = None, pipeline: Any = None, **request: Any) -> Latents:
    metadata = SimpleNamespace(raw_latent_shape=shape, patch_size=patch_size)
    return latents_of(sequence_of(prefix), metadata, SimpleNamespace(**request), pipeline)


@pytest.mark.parametrize(
    ("prefix", "shape", "patch_size", "size"),
    [
        ("wan", (1, 16, 21, 60, 104), (1, 2, 2), (21, 30, 52)),
        ("glmimage", (1, 16, 128, 96), (2, 2, 2), (1, 64, 48)),
        ("ernieimage", (1, 128, 64, 48), (1, 1, 1), (1, 64, 48)),
        ("ming_image", (1, 16, 1, 128, 96), None, (1, 64, 48)),
    ],
)
def test_latents_with_axes_of_their_own(prefix: str, shape: tuple[int, ...], patch_size: Any, size: tuple[int, ...]) -> None:
    assert latents(prefix, shape, patch_size).sizes == (size,)


def test_packed_latents_are_told_by_their_pixels() -> None:
    assert latents("flux", (1, 64 * 48, 64), height=1024, width=768).sizes == ((1, 64, 48),)
    ltx = SimpleNamespace(vae_scale_factor=32, patch_size=1)
    assert latents("ltx2", (1, 16 * 16 * 24, 128), pipeline=ltx, height=512, width=768).sizes == ((16, 16, 24),)
    reference = torch.empty(1, 300, 64)
    assert latents("flux", (1, 64 * 48, 64), height=1024, width=768, image_latent=reference).num_references == 300
    # those of LTX-2 are written into its tokens
    assert latents("ltx2", (1, 16 * 24, 128), pipeline=ltx, height=512, width=768, image_latent=reference).num_references == 0


@pytest.mark.parametrize(
    ("prefix", "shape", "request_facts"),
    [
        # layers of one picture: four times as many tokens as it has
        ("qwenimage", (1, 4 * 64 * 48, 64), {"height": 1024, "width": 768}),
        ("ltx2", (1, 1000, 128), {"height": 512, "width": 768}),
        ("wan", (1, 64 * 48, 64), {"height": 1024, "width": 768}),
        ("hunyuan", (1, 16, 1, 128, 1), {}),
    ],
)
def test_latents_of_another_form_are_not_guessed(prefix: str, shape: tuple[int, ...], request_facts: dict[str, int]) -> None:
    pipeline = SimpleNamespace(vae_scale_factor=32, patch_size=1)
    with pytest.raises(ValueError, match=r"tokens|packed"):
        latents(prefix, shape, (1, 2, 2), pipeline, **request_facts).layout()


def test_stages_that_build_no_metadata() -> None:
    request = SimpleNamespace(raw_latent_shape=None, latents=torch.empty(1, 16, 5, 44, 80))
    pipeline = SimpleNamespace(dit_config=SimpleNamespace(patch_size=(1, 2, 2)))
    assert latents_of(sequence_of("mova_video"), None, request, pipeline).sizes == ((5, 22, 40),)
    with pytest.raises(ValueError, match="no metadata"):
        latents_of(sequence_of("helios"), None, request, pipeline)


VIDEO = Latents(1, 16, ((4, 8, 10),))
REFERENCED = Latents(1, 64, ((1, 15, 21),), num_references=50)


@pytest.mark.parametrize(
    ("prefix", "known", "num_tokens", "ranks", "beside", "streams"),
    [
        ("wan", VIDEO, 320, 1, (0, 0), None),
        ("wan", VIDEO, 321, 3, (0, 1), None),
        ("hunyuan", VIDEO, 320 + 77, 1, (0, 77), None),
        ("hunyuan", VIDEO, 320 + 77, 4, (0, 77), (320, 77)),
        # fewer tokens than ranks: each has them whole
        ("hunyuan", VIDEO, 320 + 3, 4, (0, 3), None),
        ("flux", REFERENCED, 512 + 315 + 50, 1, (512, 50), None),
        ("longcat_image", Latents(1, 64, ((1, 15, 21),)), 512 + 316, 2, (512, 1), None),
        ("joyimage", Latents(1, 16, ((1, 8, 10), (1, 5, 5))), 106 + 20, 2, (0, 25 + 1 + 20), None),
    ],
)
def test_what_stands_beside_the_grid(
    prefix: str, known: Latents, num_tokens: int, ranks: int, beside: tuple[int, int], streams: tuple[int, ...] | None
) -> None:
    layout, gathered = call_tokens(sequence_of(prefix), known, "blocks.0.attn", num_tokens, ranks)
    assert (layout.num_prefix_tokens, layout.num_suffix_tokens) == beside
    assert layout.num_tokens == num_tokens
    assert gathered == (None if streams is None else GatheredTokens(streams, ranks))


@pytest.mark.parametrize(("prefix", "num_tokens", "ranks"), [("wan", 322, 1), ("wan", 640, 2), ("hunyuan", 77, 1), ("unheard of", 330, 1)])
def test_other_numbers_of_tokens_are_not_those_of_the_grid(prefix: str, num_tokens: int, ranks: int) -> None:
    layout, _ = call_tokens(sequence_of(prefix), VIDEO, "blocks.0.attn", num_tokens, ranks)
    assert layout.num_tokens != num_tokens


@pytest.mark.parametrize(
    ("prefix", "known", "path", "ranks", "reason"),
    [
        ("hunyuan", VIDEO, "blocks.0.attn", 3, "cannot share 4 frames"),
        ("hunyuan", VIDEO, "layer 0", 1, "sees the text alone"),
        ("zimage", VIDEO, "layer 0", 2, "how ranks share the text is not known"),
        ("longcat_image", REFERENCED, "layer 0", 2, "have the text whole"),
    ],
)
def test_an_order_that_is_not_known_is_not_guessed(prefix: str, known: Latents, path: str, ranks: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        call_tokens(sequence_of(prefix), known, path, 1000, ranks)
