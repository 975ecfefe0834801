"""Two processes exchange tokens for heads, as sglang does it: each serves the whole sequence of its heads, and both make what one makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ditattn.hosts.sglang.serving import serving
from hosts.sglang import ranked, reference
from hosts.sglang.server import HEAD_SIZE, LATENTS, STEPS, TOKENS
from hosts.sglang.tiny_models import MODELS, SHARED_AXIS, latents_and_texts, one_forward, parts
from hosts.sglang.tiny_wan import CALLS, LAYERS, denoised, reference_norms
from ranks import Ranks

Serve = Callable[..., Any]
HEADS = 4
SPARSE = [("rain_fusion_attn", None), ("block_sparse_attn", None), ("rain_fusion_attn", "permuted_sparse_attn")]


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2, preload=("ditattn", "hosts.sglang.ranked"))
    yield ranks
    ranks.close()


@pytest.mark.parametrize("kind", ranked.KINDS)
@pytest.mark.parametrize(("name", "backend"), SPARSE)
def test_a_layer_of_two_ranks_is_one_of_one_process(two: Ranks, kind: str, name: str, backend: str | None) -> None:
    asked = {"sparsity": 0.75, "skip_first_steps": 0, "min_tokens": 0}
    qkv = list(torch.randn(3, 1, TOKENS, HEADS, HEAD_SIZE))
    answers = two.run(ranked.layer, kind, name, {**asked, **({"backend": backend} if backend else {})}, qkv)
    expected, density = reference.sparse(backend or name, asked, qkv, LATENTS, step=1, steps=STEPS)
    assert density < 0.8
    torch.testing.assert_close(torch.cat([out for out, _ in answers], dim=1), expected, atol=2e-6, rtol=1e-5)
    for rank, (_, report) in enumerate(answers):
        assert report is not None
        assert (report.sparse, report.dense) == (1, 0)
        assert report.split == f"rank {rank} of 2 (Ulysses 2)"
    assert sum(report.sparse_density for _, report in answers) / 2 == pytest.approx(density)


@pytest.mark.parametrize("share", ["tokens", "frames"])
@pytest.mark.parametrize(("name", "backend"), SPARSE)
def test_a_whole_wan_of_two_ranks_is_one_of_one_process(two: Ranks, serve: Serve, name: str, backend: str | None, share: str) -> None:
    config = {"sparsity": 0.75, "skip_first_steps": 1, "min_tokens": 0, **({"backend": backend} if backend else {})}
    with reference_norms():
        expected = denoised(serve(name, **config))
    alone = serving().last_report.components["transformer"]
    answers = two.run(ranked.wan, name, config, LATENTS, share)
    for out, report in answers:
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
        assert report is not None
        assert (report.calls, report.dense_reasons) == (CALLS, {"first steps": 2 * LAYERS})
        assert report.sparse == alone.sparse
        assert report.token_grids == alone.token_grids
    assert sum(report.sparse_density for _, report in answers) / 2 == pytest.approx(alone.sparse_density)


@pytest.mark.parametrize("name", SHARED_AXIS)
def test_a_whole_model_with_text_of_two_ranks_is_one_of_one_process(two: Ranks, serve: Serve, name: str) -> None:
    """Each rank has a part of the text beside its part of the video or image, or all of it."""
    config, (latents, texts) = {"sparsity": 0.75}, latents_and_texts(MODELS[name])
    with reference_norms():
        expected = one_forward(MODELS[name], "rain_fusion_attn", config, latents, texts[0])
    alone = serving().end_of_stage().components["transformer"]
    answers = two.run(ranked.model, name, config)
    for (out, _), part in zip(answers, parts(name, expected, 2), strict=True):
        torch.testing.assert_close(out, part, atol=1e-4, rtol=1e-4)
    for _, report in answers:
        assert report is not None
        assert (report.sparse, report.dense_reasons) == (alone.sparse, alone.dense_reasons)
    assert sum(report.sparse_density for _, report in answers) / 2 == pytest.approx(alone.sparse_density)


# 3 x 17 x 31 tokens
ODD = (1, 4, 3, 34, 62)


@pytest.mark.parametrize("backend", ["rain_fusion_attn", "permuted_sparse_attn"])
def test_padding_that_sglang_attends_to_is_kept_whole(two: Ranks, backend: str) -> None:
    config = {"sparsity": 0.75, "skip_first_steps": 0, "min_tokens": 0, "backend": backend}
    qkv = list(torch.randn(3, 1, 3 * 17 * 31 + 1, HEADS, HEAD_SIZE))
    answers = two.run(ranked.layer, "USPAttention", "rain_fusion_attn", config, qkv, ODD)
    del config["backend"]
    expected, density = reference.sparse(backend, config, qkv, ODD, step=1, steps=STEPS, num_suffix_tokens=1)
    assert density < 0.8
    torch.testing.assert_close(torch.cat([out for out, _ in answers], dim=1), expected, atol=2e-6, rtol=1e-5)
    assert sum(report.sparse_density for _, report in answers) / 2 == pytest.approx(density)


def test_a_whole_wan_with_padding(two: Ranks, serve: Serve) -> None:
    """sglang's Wan adds a token that nothing masks: its own result is not that of one process, and ours at sparsity 0 is its own."""
    with reference_norms():
        alone = denoised(serve("torch_sdpa"), ODD)
    expected = two.run(ranked.wan, "torch_sdpa", {}, ODD, "tokens")[0][0]
    assert (expected - alone).abs().max() > 1e-4, "sglang leaves out its padding: ours can, too"
    config = {"skip_first_steps": 0, "min_tokens": 0}
    for out, _ in two.run(ranked.wan, "rain_fusion_attn", {"sparsity": 0, **config}, ODD, "tokens"):
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    for out, report in two.run(ranked.wan, "rain_fusion_attn", {"sparsity": 0.75, **config}, ODD, "tokens"):
        assert (out - expected).abs().max() > 1e-3
        assert report is not None
        assert (report.sparse, report.dense, report.token_grids) == (CALLS, 0, {"3x17x31": 2 * STEPS})
