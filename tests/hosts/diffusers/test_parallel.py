"""Two ranks share the tokens of a denoiser: the result of one process, by the plans of one process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import split_calls
import split_pipelines
from ditattn.errors import UnsupportedCall
from ditattn.hosts.diffusers import parallel
from pairwise import each_with_one
from ranks import Ranks

# fp32, latents of order 1: exact kernels sum in another order, and a denoiser makes more of it
BOUND = 1e-4
# two places of a ring share their tokens by whole blocks of the orders that all heads share
IN_WHOLE_BLOCKS = ("wan in whole blocks", "ltx video", "ltx video behind a video")
SPARSE_BACKENDS = ("block_sparse_attn", "rain_fusion_attn", "permuted_sparse_attn")


def dense(names: Iterable[str], *further: Any) -> list[Any]:
    """Every family with the dense backend."""
    return each_with_one(names, ("torch_sdpa",), *further)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def degrees_of(name: str) -> dict[str, Any]:
    # 7 text tokens: no two ranks share them equally
    return {"ulysses_degree": 2, "ulysses_anything": name.startswith("qwen image")}


@pytest.mark.shows("Ulysses")
@pytest.mark.parametrize(
    ("name", "backend", "sparsity"),
    [
        *dense(split_pipelines.FAMILIES, 0),
        *each_with_one(split_pipelines.FAMILIES, SPARSE_BACKENDS, 0, start=1),
        *each_with_one(split_pipelines.FAMILIES, SPARSE_BACKENDS, 0.75),
    ],
)
def test_ulysses_is_one_process(two: Ranks, name: str, backend: str, sparsity: float) -> None:
    check_ulysses(two, name, backend, sparsity)


@pytest.mark.shows("Ulysses")
@pytest.mark.parametrize(("name", "backend"), each_with_one(split_pipelines.FURTHER, SPARSE_BACKENDS))
def test_ulysses_is_one_process_for_several_grids_and_further_families(two: Ranks, name: str, backend: str) -> None:
    check_ulysses(two, name, backend, 0.75)


@pytest.mark.parametrize("name", split_pipelines.FURTHER)
def test_dense_ulysses_is_one_process_for_several_grids_and_further_families(two: Ranks, name: str) -> None:
    check_ulysses(two, name, "torch_sdpa", 0)


@pytest.mark.shows("Ulysses")
@pytest.mark.parametrize(
    ("name", "backend", "sparsity"),
    [*dense(split_pipelines.PLANNED, 0), *each_with_one(split_pipelines.PLANNED, SPARSE_BACKENDS, 0.75)],
)
def test_ulysses_is_one_process_by_our_own_plans(two: Ranks, name: str, backend: str, sparsity: float) -> None:
    check_ulysses(two, name, backend, sparsity)


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
            assert report.sparse_density < 0.8
        else:
            assert report.sparse == 0


@pytest.mark.shows("ring")
@pytest.mark.parametrize(("name", "backend"), each_with_one(split_pipelines.RING, ("torch_sdpa", *SPARSE_BACKENDS)))
def test_ring_with_every_block_is_one_process(two: Ranks, name: str, backend: str) -> None:
    for found in two.run(split_pipelines.compare_ring, name, backend, everything(backend), ring_of(name)):
        assert found["error"] < BOUND
        assert (found["report"].sparse == 0) == (backend == "torch_sdpa")


@pytest.mark.shows("ring")
@pytest.mark.parametrize(("name", "backend"), each_with_one(split_pipelines.RING, SPARSE_BACKENDS))
def test_ring_is_exact_over_its_own_plan(two: Ranks, name: str, backend: str) -> None:
    for rank, found in enumerate(over_their_own_plans(two, name, backend, ring_of(name))):
        report = found["report"]
        assert report.split == f"rank {rank} of 2 (ring 2)"
        assert len(found["off"]) == report.sparse > 0
        assert max(found["off"]) < 2e-5
        assert report.dense == 0
        # a short last block of kept keys counts as it is: a share of blocks is a little more than its share of pairs
        assert 0.2 <= report.sparse_density < 0.9
        # images have no first frame, and permuted_sparse_attn keeps none of its rows whole
        is_video = name.startswith(("wan", "hunyuan", "cogvideox", "ltx"))
        # where its first frame has no whole block, nothing is dealt
        assert name in ("chronoedit", "wan of odd sizes") or bool(found["dealt"]) == (is_video and backend != "permuted_sparse_attn")
        # ranks of permuted_sparse_attn deal out whole blocks, too
        assert (report.own_blocks == 0) == (name in IN_WHOLE_BLOCKS or backend == "permuted_sparse_attn")
        if has_plans_of_one_process(name, backend):
            assert len(found["wrong"]) == report.sparse
            assert max(found["wrong"]) == 0
            assert found["error"] < BOUND


def has_plans_of_one_process(name: str, backend: str) -> bool:
    # ranks of permuted_sparse_attn have a budget each
    return name in IN_WHOLE_BLOCKS and backend != "permuted_sparse_attn"


def over_their_own_plans(ranks: Ranks, name: str, backend: str, degrees: dict[str, Any]) -> list[dict[str, Any]]:
    config = {**split_pipelines.SPARSE, **({"tail": False} if backend == "permuted_sparse_attn" else {})}
    return ranks.run(split_pipelines.compare_ring, name, backend, config, degrees, True, has_plans_of_one_process(name, backend))


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("wan", {"ring_degree": 2}),
        pytest.param("flux", {"ring_degree": 2}, marks=pytest.mark.long),
        pytest.param("wan", {"ulysses_degree": 2}, marks=pytest.mark.long),
    ],
)
def test_compiled_blocks_do_as_others(two: Ranks, name: str, degrees: dict[str, int]) -> None:
    for found in two.run(split_pipelines.compiled, name, degrees):
        assert found["error"] < BOUND
        eager, compiled = found["reports"]
        assert compiled.sparse == eager.sparse == compiled.calls > 0
        assert compiled.sparse_density == eager.sparse_density
        # rows of the first frame are dealt out inside the operation that a graph knows
        assert found["dealt"][0] == found["dealt"][1]
        assert bool(found["dealt"][1]) == (name == "wan" and "ring_degree" in degrees)


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


TWO_BY_TWO = {"ulysses_degree": 2, "ring_degree": 2}


@pytest.mark.parametrize(("name", "backend"), each_with_one(split_pipelines.BOTH, ("torch_sdpa", *SPARSE_BACKENDS)))
def test_both_degrees_together(four: Ranks, name: str, backend: str) -> None:
    for rank, found in enumerate(four.run(split_pipelines.compare_ring, name, backend, everything(backend), TWO_BY_TWO)):
        assert found["error"] < BOUND
        assert found["report"].split == f"rank {rank} of 4 (Ulysses 2, ring 2)"
        assert (found["report"].sparse == 0) == (backend == "torch_sdpa")


@pytest.mark.parametrize(("name", "backend"), each_with_one(split_pipelines.BOTH, SPARSE_BACKENDS))
def test_both_degrees_together_are_exact_over_their_own_plans(four: Ranks, name: str, backend: str) -> None:
    for found in over_their_own_plans(four, name, backend, TWO_BY_TWO):
        report = found["report"]
        assert len(found["off"]) == report.sparse == report.calls > 0
        assert max(found["off"]) < 2e-5
        assert 0.2 <= report.sparse_density < 0.9
        assert (report.own_blocks == 0) == (name in IN_WHOLE_BLOCKS or backend == "permuted_sparse_attn")
        if has_plans_of_one_process(name, backend):
            assert len(found["wrong"]) == report.sparse
            assert max(found["wrong"]) == 0
            assert found["error"] < BOUND


@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
@pytest.mark.parametrize("degrees", [{"ulysses_degree": 4}, {"ring_degree": 4}, TWO_BY_TWO], ids=["Ulysses", "ring", "both"])
def test_calls_of_random_sizes(four: Ranks, backend: str, degrees: dict[str, int]) -> None:
    for sparsity in (0, everything(backend)["sparsity"], 0.75):
        if sparsity == 0.75 and backend == "permuted_sparse_attn" and degrees == {"ulysses_degree": 4}:
            # its budget is one for the heads of a rank: compared in whole pipelines
            continue
        calls = [call for found in four.run(split_calls.random_calls, backend, sparsity, degrees, 4) for call in found]
        assert [call for call in calls if call["sparse"] != (sparsity > 0) or len(call["off"]) != 1] == []
        # exact over its plan is a call in a wrong order of tokens too, but it keeps other tokens than the text's
        assert [call for call in calls if max(call["off"]) > 2e-5 or not call["text kept"]] == []
        assert sparsity < 0.75 or min(call["density"] for call in calls) < 0.7


def test_words_that_both_degrees_together_cannot_share_are_refused(four: Ranks) -> None:
    for message in four.run(split_pipelines.odd_words_for_both_degrees):
        assert "4 ranks cannot share 10 tokens equally" in message
        assert "or one degree alone" in message


@pytest.mark.parametrize("name", ["wan", "ltx video"])
def test_branches_and_heads_are_shared_together(four: Ranks, name: str) -> None:
    found = four.run(split_pipelines.guided, name, "rain_fusion_attn", split_pipelines.SPARSE, {"ulysses_degree": 2})
    for rank, one in enumerate(found):
        assert one["error"] < BOUND
        assert one["report"].split == f"rank {rank % 2} of 2 (Ulysses 2)"


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


@pytest.mark.parametrize("name", ["flux", "qwen image of padded words"])
@pytest.mark.parametrize("backend", ["rain_fusion_attn", "permuted_sparse_attn"])
def test_what_settings_would_do_is_seen_as_in_one_process(two: Ranks, name: str, backend: str) -> None:
    for whole, split in two.run(split_pipelines.probed, name, backend, degrees_of(name)):
        check_readings(whole, split, mass=1e-3 if backend == "rain_fusion_attn" else 0.05)


@pytest.mark.parametrize(("name", "backend"), [("wan in whole blocks", "block_sparse_attn"), ("wan", "permuted_sparse_attn")])
def test_what_settings_would_do_is_seen_under_ring_too(two: Ranks, name: str, backend: str) -> None:
    for whole, split in two.run(split_pipelines.probed, name, backend, {"ring_degree": 2}):
        check_readings(whole, split, mass=0.05)


def check_readings(whole: list[Any], split: list[Any], mass: float) -> None:
    assert [(cell.step, cell.layer) for cell in split] == [(cell.step, cell.layer) for cell in whole]
    for expected, cell in zip(whole, split, strict=True):
        assert cell.density == pytest.approx(expected.density, abs=0.01)
        assert 0.1 < cell.density < 0.9
        assert cell.dropped_mass == pytest.approx(expected.dropped_mass, rel=mass)
        # the mean of the ranks' relative errors is not the relative error of all
        assert cell.error == pytest.approx(expected.error, rel=0.3)


@pytest.mark.shows("CFG")
@pytest.mark.parametrize(
    ("name", "backend"),
    [*dense(split_pipelines.GUIDED), *each_with_one(split_pipelines.GUIDED, ("rain_fusion_attn", "permuted_sparse_attn"))],
)
def test_ranks_that_share_the_branches_of_guidance_are_one_process(two: Ranks, name: str, backend: str) -> None:
    config = {} if backend == "torch_sdpa" else split_pipelines.SPARSE
    for found in two.run(split_pipelines.guided, name, backend, config, {}):
        # heads choose their orders on the samples that a rank sees, which are half of the batch, or the first of Mochi's single ones
        choose = backend == "permuted_sparse_attn" and name in ("mochi", "ltx video")
        assert found["error"] < (0.1 if choose else BOUND)
        of_one, report = found["of one"], found["report"]
        if name in ("wan", "qwen image"):
            # the first of three steps is made by both, where a step has two forwards
            assert report.calls == of_one.calls * 4 / 6
        else:
            assert report.calls == of_one.calls / (2 if name == "mochi" else 1)
        if config:
            assert report.sparse == report.calls
            assert report.sparse_density == pytest.approx(of_one.sparse_density, abs=0.05)


def test_a_step_without_two_branches_is_refused(two: Ranks) -> None:
    for message, error in two.run(split_pipelines.unguided):
        assert "a step of the WanTransformer3DModel had 1 forwards" in message
        assert error < BOUND


@pytest.mark.shows("tensor")
@pytest.mark.parametrize(
    ("name", "backend"),
    [*dense(split_pipelines.WEIGHTS), *each_with_one(split_pipelines.WEIGHTS, ("rain_fusion_attn", "permuted_sparse_attn"))],
)
def test_tensor_parallel_is_one_process(two: Ranks, name: str, backend: str) -> None:
    by_hand = name == "hunyuan video"
    config = {} if backend == "torch_sdpa" else split_pipelines.SPARSE
    for rank, found in enumerate(two.run(split_pipelines.tensor_parallel, name, backend, config, by_hand)):
        assert found["error"] < BOUND
        assert found["report"].split == f"rank {rank} of 2 (tensor parallel)"
        assert found["report"].sparse == found["of one"].sparse
        if config:
            assert len(found["wrong"]) == found["report"].sparse > 0
            assert max(found["wrong"]) == 0
            assert found["heads"] == ({2, 4} if by_hand else {2})


def test_a_rank_takes_its_heads_share_of_given_bricks(two: Ranks) -> None:
    assert two.run(split_pipelines.given_bricks) == [{"1x8x16": 4}, {"4x2x16": 2, "4x4x8": 2}]


def test_a_rank_takes_its_heads_share_of_given_bricks_where_weights_are_split(two: Ranks) -> None:
    whole = {"1x8x16": 2, "4x2x16": 1, "4x4x8": 1}
    found = two.run(split_pipelines.given_bricks_of_split_weights)
    assert found == [{**whole, "1x8x16": 4}, {**whole, "4x2x16": 2, "4x4x8": 2}]


def test_weights_that_fsdp_splits_are_whole_where_a_layer_runs(two: Ranks) -> None:
    for found in two.run(split_pipelines.fully_sharded):
        assert found["error"] < BOUND
        assert found["report"].split == ""
        assert found["report"].token_orders == {"1x8x16": 4, "4x2x16": 2, "4x4x8": 2}


def test_all_ranks_refuse_given_bricks_for_another_number_of_heads(two: Ranks) -> None:
    for message in two.run(split_pipelines.too_many_bricks):
        assert "head_bricks: layer 0 has 3 key heads, its entry names 4" in message


def test_the_first_steps_are_as_many_as_in_one_process(two: Ranks) -> None:
    for found in two.run(split_pipelines.with_defaults):
        assert found["error"] < BOUND
        assert found["report"].dense_reasons == found["of one"].dense_reasons == {"first steps": 4}
        assert found["report"].sparse == found["of one"].sparse == 12


def test_three_heads_on_two_ranks(two: Ranks) -> None:
    for rank, (refusal, error, heads) in enumerate(two.run(split_pipelines.three_heads)):
        assert "ulysses_degree=2 does not divide the 3 heads: choose 3, or a ring_degree, or ContextParallelConfig" in refusal
        assert "(--uneven-split)" in refusal
        assert error < BOUND
        assert heads == {2 - rank}


@pytest.mark.parametrize(
    ("anything", "message"), [(False, "ulysses_degree=3 does not divide the 4 heads"), (True, "4 heads are too few for ulysses_degree=3")]
)
def test_a_degree_that_no_uneven_split_allows_is_refused_with_those_that_would_do(anything: bool, message: str) -> None:
    heads = torch.zeros(1, 4, 4, 32)
    with pytest.raises(UnsupportedCall, match=message) as refused:
        parallel._check(heads, heads, False, SimpleNamespace(ulysses_degree=3, ulysses_anything=anything))
    assert str(refused.value).endswith("choose 2 or 4, or a ring_degree")


def test_installing_before_or_after_the_split_is_the_same_and_leaving_leaves_no_trace(two: Ranks) -> None:
    for found in two.run(split_pipelines.both_orders):
        assert found["same"]
        assert found["dense afterwards"] < BOUND
        assert found["left"] == set()


def test_a_model_that_others_have_split_runs_densely_counted_and_strict_refuses_it(two: Ranks) -> None:
    for found in two.run(split_pipelines.split_by_others):
        (reason,) = found["report"].dense_reasons
        assert reason == "a part of the tokens alone: they are split between processes that are not known here"
        assert found["report"].sparse == 0
        assert "would run densely in step 0: a part of the tokens alone" in found["refusal"]


def test_splits_that_are_not_served_are_refused(two: Ranks) -> None:
    for messages in two.run(split_pipelines.refusals):
        assert "how the tokens of ConsisID are split is not known here" in messages["unknown streams before"]
        assert "ConsisID is not served under context parallelism" in messages["unknown streams after"]
        assert "leaves some of them whole on every rank" in messages["a stream left whole"]
        assert "does not hand the host's parallel configuration on" in messages["processor without it"]
        assert "every token of the LTXVideoTransformer3DModel has a timestep of its own" in messages["timesteps of tokens"]
        assert "key heads" in messages["fewer key heads"]
        assert "causal" in messages["causal"]
