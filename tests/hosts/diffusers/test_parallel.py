"""Two ranks share the tokens of a denoiser: the result of one process, by the plans of one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest

import split_pipelines
from ranks import Ranks

# fp32, latents of order 1: exact kernels sum in another order, and a denoiser makes more of it
BOUND = 1e-4
SPARSE_BACKENDS = ("block_sparse_attn", "rain_fusion_attn", "permuted_sparse_attn")


def each_with_one(names: Iterable[str], backends: Sequence[str]) -> list[Any]:
    """All pairs. Those beyond one backend for each family, in turn, are `long`: how a family is split and what a backend does with its
    share are two rules.
    """
    return [
        pytest.param(name, backend, marks=[] if number % len(backends) == turn else pytest.mark.long, id=f"{backend}-{name}")
        for number, name in enumerate(names)
        for turn, backend in enumerate(backends)
    ]


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def degrees_of(name: str) -> dict[str, Any]:
    # 7 text tokens: no two ranks share them equally
    return {"ulysses_degree": 2, "ulysses_anything": name.startswith("qwen image")}


@pytest.mark.parametrize("name", split_pipelines.FAMILIES)
@pytest.mark.parametrize(("backend", "sparsity"), [("torch_sdpa", 0), *itertools.product(SPARSE_BACKENDS, (0, 0.75))])
def test_ulysses_is_one_process(two: Ranks, name: str, backend: str, sparsity: float) -> None:
    check_ulysses(two, name, backend, sparsity)


@pytest.mark.parametrize(("name", "backend"), each_with_one(split_pipelines.FURTHER, SPARSE_BACKENDS))
def test_ulysses_is_one_process_for_several_grids_and_further_families(two: Ranks, name: str, backend: str) -> None:
    check_ulysses(two, name, backend, 0.75)


@pytest.mark.parametrize("name", split_pipelines.FURTHER)
def test_dense_ulysses_is_one_process_for_several_grids_and_further_families(two: Ranks, name: str) -> None:
    check_ulysses(two, name, "torch_sdpa", 0)


def check_ulysses(two: Ranks, name: str, backend: str, sparsity: float) -> None:
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


@pytest.mark.parametrize(("name", "backend"), each_with_one(split_pipelines.RING, ("torch_sdpa", *SPARSE_BACKENDS)))
def test_ring_with_every_block_is_one_process(two: Ranks, name: str, backend: str) -> None:
    for found in two.run(split_pipelines.compare_ring, name, backend, everything(backend), ring_of(name)):
        assert found["error"] < BOUND
        assert (found["report"].sparse == 0) == (backend == "torch_sdpa")


@pytest.mark.parametrize(("name", "backend"), each_with_one(split_pipelines.RING, SPARSE_BACKENDS))
def test_ring_is_exact_over_its_own_plan(two: Ranks, name: str, backend: str) -> None:
    config = {**split_pipelines.SPARSE, **({"tail": False} if backend == "permuted_sparse_attn" else {})}
    for rank, found in enumerate(two.run(split_pipelines.compare_ring, name, backend, config, ring_of(name))):
        report = found["report"]
        assert report.split == f"rank {rank} of 2 (ring 2)"
        assert len(found["off"]) == report.sparse > 0
        assert max(found["off"]) < 2e-5
        assert report.dense == 0
        # a short last block of kept keys counts as it is: a share of blocks is a little more than its share of pairs
        assert 0.2 <= report.sparse_density < 0.9
        # heads of permuted_sparse_attn choose their bricks by a rank's own queries
        together = name == "wan in whole blocks" and backend != "permuted_sparse_attn"
        assert together == (report.own_blocks == 0)
        if together:
            assert len(found["wrong"]) == report.sparse
            assert max(found["wrong"]) == 0
            assert found["error"] < BOUND


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("name", ["wan", "flux of 12 words"])
@pytest.mark.parametrize("backend", ["torch_sdpa", "block_sparse_attn", "permuted_sparse_attn"])
def test_both_degrees_together(four: Ranks, name: str, backend: str) -> None:
    degrees = {"ulysses_degree": 2, "ring_degree": 2}
    for rank, found in enumerate(four.run(split_pipelines.compare_ring, name, backend, everything(backend), degrees)):
        assert found["error"] < BOUND
        assert found["report"].split == f"rank {rank} of 4 (Ulysses 2, ring 2)"


def everything(backend: str) -> dict[str, Any]:
    """A sparsity that drops no block of so few, and runs sparse all the same."""
    if backend == "torch_sdpa":
        return {}
    return {**split_pipelines.SPARSE, "sparsity": 1e-4 if backend == "permuted_sparse_attn" else 0.01}


def ring_of(name: str) -> dict[str, Any]:
    return {"ring_degree": 2, "ring_anything": name == "qwen image"}


@pytest.mark.parametrize("name", ["wan", "flux", "qwen image of padded words"])
def test_four_ranks_share_too(four: Ranks, name: str) -> None:
    # four ranks cannot share Flux's 10 text tokens or 5 words equally
    degrees = {"ulysses_degree": 4, "ulysses_anything": name != "wan"}
    found = four.run(split_pipelines.compare, name, "rain_fusion_attn", split_pipelines.SPARSE, degrees)
    assert [one["report"].split for one in found] == [f"rank {rank} of 4 (Ulysses 4)" for rank in range(4)]
    for one in found:
        assert one["error"] < BOUND
        assert len(one["wrong"]) == one["report"].sparse > 0
        assert max(one["wrong"]) == 0


def test_a_rank_takes_its_heads_share_of_given_bricks(two: Ranks) -> None:
    assert two.run(split_pipelines.given_bricks) == [{"1x8x16": 4}, {"4x2x16": 2, "4x4x8": 2}]


def test_the_first_steps_are_as_many_as_in_one_process(two: Ranks) -> None:
    for found in two.run(split_pipelines.with_defaults):
        assert found["error"] < BOUND
        assert found["report"].dense_reasons == found["of one"].dense_reasons == {"first steps": 4}
        assert found["report"].sparse == found["of one"].sparse == 12


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
        assert "does not hand the host's parallel configuration on" in messages["processor without it"]
        assert "HunyuanVideo is not served under context parallelism" in messages["hunyuan after"]
        assert "every token of the LTXVideoTransformer3DModel has a timestep of its own" in messages["timesteps of tokens"]
        assert "key heads" in messages["fewer key heads"]
        assert "causal" in messages["causal"]
