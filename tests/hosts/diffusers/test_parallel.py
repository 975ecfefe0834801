"""Two ranks share the tokens of a denoiser: the result of one process, by the plans of one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

import split_pipelines
from ranks import Ranks

# fp32, latents of order 1: exact kernels sum in another order, and a denoiser makes more of it
BOUND = 1e-4
SPARSE_BACKENDS = ("block_sparse_attn", "rain_fusion_attn", "permuted_sparse_attn")


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def degrees_of(name: str) -> dict[str, Any]:
    # 7 text tokens: no two ranks share them equally
    return {"ulysses_degree": 2, "ulysses_anything": name == "qwen image"}


@pytest.mark.parametrize("name", split_pipelines.FAMILIES)
@pytest.mark.parametrize(("backend", "sparsity"), [("torch_sdpa", 0), *itertools.product(SPARSE_BACKENDS, (0, 0.75))])
def test_ulysses_is_one_process(two: Ranks, name: str, backend: str, sparsity: float) -> None:
    config = {} if backend == "torch_sdpa" else {"sparsity": sparsity, "skip_first_steps": 0, "min_tokens": 0}
    for rank, found in enumerate(two.run(split_pipelines.compare, name, backend, config, degrees_of(name))):
        assert found["error"] < BOUND
        report = found["report"]
        assert report.split == f"rank {rank} of 2 (Ulysses 2)"
        assert report.communication_ms > 0
        if sparsity:
            assert len(found["wrong"]) == report.sparse > 0
            assert report.dense == 0
            assert max(found["wrong"]) == 0
            assert report.sparse_density < 0.7
        else:
            assert report.sparse == 0


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_four_ranks_share_too(name: str) -> None:
    ranks = Ranks(4)
    config = {"sparsity": 0.75, "skip_first_steps": 0, "min_tokens": 0}
    try:
        # four ranks cannot share Flux's 10 text tokens equally
        found = ranks.run(
            split_pipelines.compare, name, "rain_fusion_attn", config, {"ulysses_degree": 4, "ulysses_anything": name == "flux"}
        )
    finally:
        ranks.close()
    assert [one["report"].split for one in found] == [f"rank {rank} of 4 (Ulysses 4)" for rank in range(4)]
    for one in found:
        assert one["error"] < BOUND
        assert len(one["wrong"]) == one["report"].sparse > 0
        assert max(one["wrong"]) == 0


def test_three_heads_on_two_ranks(two: Ranks) -> None:
    for rank, (refusal, error, heads) in enumerate(two.run(split_pipelines.three_heads)):
        assert "ulysses_degree=2 does not divide the 3 heads" in refusal
        assert error < BOUND
        assert heads == {2 - rank}


def test_installing_before_or_after_the_split_is_the_same_and_leaving_leaves_no_trace(two: Ranks) -> None:
    for found in two.run(split_pipelines.both_orders):
        assert found["same"]
        assert found["dense afterwards"] < BOUND
        assert found["left"] == set()


def test_splits_that_are_not_served_are_refused(two: Ranks) -> None:
    for messages in two.run(split_pipelines.refusals):
        assert "do not go through diffusers' dispatcher" in messages["cogvideox before"]
        assert "CogVideoX is not served under context parallelism" in messages["cogvideox after"]
        assert "ring_degree=2" in messages["ring before"]
        assert "does not hand the host's parallel configuration on" in messages["processor without it"]
        assert "HunyuanVideo is not served under context parallelism" in messages["hunyuan after"]
        assert "key heads" in messages["fewer key heads"]
        assert "causal" in messages["causal"]
