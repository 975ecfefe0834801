"""permuted_sparse_attn: exact over its plan and tail, planted heads get the orders that suit them, orders last for a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import judge
import oracle
from ditattn.backends.base import CallRecord
from ditattn.backends.permuted_sparse_attn import PermutedSparseAttentionBackend, PermutedSparseAttentionConfig, brick_choice
from ditattn.backends.sparse import impl
from ditattn.errors import ConfigError, UnsupportedCall
from ditattn.ops.table import CallFacts, choose
from ditattn.plan.bricks import brick_order
from ditattn.plan.split import HeadShare
from sparse_calls import call, draw, tail_of

GRID = (17, 16, 16)
LENGTH = 17 * 16 * 16


class Layer:
    """One layer's implementation and what its calls recorded."""

    def __init__(self, heads: int, head_size: int, key_heads: int | None = None) -> None:
        self.records: list[CallRecord] = []
        self.impl = PermutedSparseAttentionBackend.get_impl_cls()(
            heads, head_size, None, False, key_heads, "blocks.0.attn1", layer_index=0, observer=self.records.append
        )

    def step(self, step: int, tensors: tuple[Tensor, Tensor, Tensor], grid: tuple[int, int, int] = GRID, **fields: Any) -> Tensor:
        keys = {"sparsity": 0.75, "skip_first_steps": 2, "num_steps": 20, "residual": False, **fields}
        built = PermutedSparseAttentionBackend.get_builder_cls()().build(
            current_timestep=step, raw_latent_shape=(1, 4, *grid), patch_size=1, **keys
        )
        return self.impl.forward(*tensors, built)


def planted(length: int, head_size: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Two heads of a video of GRID tokens: one sees its own frame around it, the other its own place in all frames."""
    place = torch.arange(length)
    # all tokens of a frame have one direction; all tokens at one place of the picture have one
    frames, places = draw(17, head_size, seed=3), draw(256, head_size, seed=4)
    tensors = [2.0 * frames[place // 256], 2.0 * places[place % 256]]
    keys = torch.stack(tensors, 1).unsqueeze(0)
    return keys, keys.clone(), draw(1, length, 2, head_size, seed=5)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_exact_attention_over_the_recorded_plan_and_the_means_of_the_rest(dtype: torch.dtype, tail: bool) -> None:
    q, k, v = (draw(2, 1440, heads, 32, seed=i, dtype=dtype) for i, heads in enumerate((4, 2, 2)))
    layer = Layer(4, 32, 2)
    out = layer.step(9, (q, k, v), (3, 24, 20), tail=tail)
    order = layer.impl._chosen[1].keys
    plan = layer.records[-1].plan
    means = tail_of(q, k, v, order) if tail else None
    exact = order.undo(oracle.attention(order.apply(q), order.apply(k), order.apply(v), plan=plan, tail=means)[0])
    assert judge.relative_error(out, exact) < 4 * torch.finfo(dtype).eps
    assert plan.density() < 0.6, "first frame and two blocks a row of twelve"


def test_planted_heads_get_the_orders_that_suit_them() -> None:
    tensors = planted(LENGTH)
    layer = Layer(2, 32)
    # so few blocks that no other shape holds what a head looks at
    layer.step(1, tensors, sparsity=0.88)
    layer.step(2, tensors, sparsity=0.88)
    assert layer.records[-1].token_orders is not None
    spatial, temporal = layer.impl._chosen[1].keys.forward
    assert torch.equal(spatial, brick_order((1, 8, 16), GRID).forward)
    assert any(torch.equal(temporal, brick_order(brick, GRID).forward) for brick in ((16, 4, 2), (16, 1, 8)))


def test_the_orders_are_chosen_in_the_last_dense_step_and_last_for_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = planted(LENGTH)
    measured: list[bool] = []
    error = brick_choice.sample_error

    def watched(*arguments: Any) -> Tensor:
        measured.append(arguments[-1] is not None)
        return error(*arguments)

    monkeypatch.setattr(brick_choice, "sample_error", watched)
    layer = Layer(2, 32)
    for step in (0, 1, 1, 2, 3):
        layer.step(step, tensors)
    assert measured == [True] * 5, "five shapes, once, against the dense result"
    assert [record.reason for record in layer.records] == ["first steps"] * 3 + [None] * 2
    assert len(layer.records[3].token_orders) == 2, "one for each head"
    assert layer.records[4].token_orders is None, "said once"
    layer.impl.end_run()
    layer.step(3, tensors)
    assert measured == [True] * 5 + [False] * 5, "a run without a dense step chooses by the estimate"


def test_given_orders_are_taken_and_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brick_choice, "sample_error", lambda *_: pytest.fail("it chose"))
    tensors = planted(LENGTH)
    layer = Layer(2, 32)
    for step in (0, 1, 2):
        layer.step(step, tensors, head_bricks=["16x4x2,1x8x16", "4x2x16"])
    assert layer.records[-1].token_orders == ("16x4x2", "1x8x16")
    temporal, spatial = layer.impl._chosen[1].keys.forward
    assert torch.equal(temporal, brick_order((16, 4, 2), GRID).forward)
    assert torch.equal(spatial, brick_order((1, 8, 16), GRID).forward)


def test_one_given_order_serves_all_heads_and_a_layer_without_one_chooses() -> None:
    tensors = planted(LENGTH)
    layer = Layer(2, 32)
    layer.step(2, tensors, head_bricks=["4x2x16"])
    assert layer.records[-1].token_orders == ("4x2x16", "4x2x16")
    for head_bricks in ([""], []):
        layer = Layer(2, 32)
        layer.step(2, tensors, sparsity=0.88, head_bricks=head_bricks)
        assert layer.records[-1].token_orders[0] == "1x8x16"
        assert layer.records[-1].token_orders[1] != "1x8x16"


def test_a_rank_takes_its_heads_of_given_orders() -> None:
    tensors = planted(LENGTH)
    named = "1x8x16,4x2x16,16x4x2"
    for place, expected in enumerate([("1x8x16", "4x2x16"), ("16x4x2",)]):
        layer = Layer(len(expected), 32)
        layer.step(2, tuple(x[:, :, : len(expected)] for x in tensors), head_bricks=[named], heads=HeadShare(place, 2, 3))
        assert layer.records[-1].token_orders == expected


@pytest.mark.parametrize(
    ("named", "message"),
    [("1x8x16,1x8x16,1x8x16,1x8x16", "layer 0 has 3 key heads, its entry names 4"), ("1x8x16,1x8x16,64x2x1", "64x2x1 does not fit")],
)
def test_all_ranks_refuse_given_orders_that_one_of_them_could_not_take(named: str, message: str) -> None:
    # two heads for rank 0, one for rank 1: a share of four names would fit rank 0, and the shape of the last head is none of its own
    tensors = planted(LENGTH)
    for place, heads in enumerate([2, 1]):
        with pytest.raises(ConfigError, match=message):
            Layer(heads, 32).step(2, tuple(x[:, :, :heads] for x in tensors), head_bricks=[named], heads=HeadShare(place, 2, 3))


@pytest.mark.parametrize(
    ("grid", "head_bricks", "message"),
    [
        (GRID, ["16x4x2,1x8x16,4x2x16"], "layer 0 has 2 key heads, its entry names 3"),
        ((5, 16, 16), ["1x8x16,16x4x2"], "16x4x2 does not fit the 5 x 16 x 16 tokens of this call"),
        ((17, 16, 8), ["4x2x16"], "4x2x16 does not fit the 17 x 16 x 8 tokens"),
    ],
)
def test_given_orders_of_another_model_or_size_are_refused(grid: tuple[int, int, int], head_bricks: list[str], message: str) -> None:
    tensors = tuple(x[:, : grid[0] * grid[1] * grid[2]] for x in planted(LENGTH))
    with pytest.raises(ConfigError, match=message):
        Layer(2, 32).step(2, tensors, grid, head_bricks=head_bricks)


def test_given_orders_are_read_when_the_configuration_is() -> None:
    with pytest.raises(ConfigError, match=r"head_bricks: bricks: '4x2' is not of the form"):
        PermutedSparseAttentionConfig.from_mapping({"head_bricks": ["4x2x16,4x2"]})


def test_short_runs_choose_by_the_estimate_and_another_grid_chooses_anew() -> None:
    tensors = planted(LENGTH)
    layer = Layer(2, 32)
    layer.step(1, tensors, num_steps=8)
    assert layer.impl._chosen is None
    layer.step(2, tensors, num_steps=8)
    before = layer.impl._chosen
    layer.step(3, tuple(x[:, : 5 * 256] for x in tensors), (5, 16, 16), num_steps=8)
    assert layer.impl._chosen[0] != before[0]


def test_the_tail_brings_the_result_nearer_to_dense() -> None:
    tensors = planted(LENGTH)
    exact = oracle.attention(*tensors)[0]
    errors = [judge.relative_error(Layer(2, 32).step(9, tensors, tail=tail), exact) for tail in (True, False)]
    assert errors[0] < errors[1]


def test_a_planted_object_is_kept() -> None:
    """One key block carries the mass of one query block."""
    q, k, v = (draw(1, LENGTH, 2, 32, seed=i) * 0.1 for i in range(3))
    order = brick_order((1, 8, 16), GRID).forward
    q[:, order[20 * 128 : 21 * 128], 1] += 3
    k[:, order[9 * 128 : 10 * 128], 1] += 3
    v[:, order[9 * 128 : 10 * 128], 1] = draw(128, 32, seed=7)
    layer = Layer(2, 32)
    layer.step(9, (q, k, v), bricks="1x8x16", sparsity=0.9)
    assert bool(layer.records[-1].plan.to_mask()[0, 1, 20, 9])


def test_equal_inputs_give_equal_plans() -> None:
    tensors = planted(LENGTH)
    plans = []
    for _ in range(2):
        layer = Layer(2, 32)
        layer.step(1, tensors)
        layer.step(2, tensors)
        plans.append(layer.records[-1].plan)
    assert torch.equal(plans[0].indices, plans[1].indices)


@pytest.mark.parametrize("sizes", [{"num_prefix_tokens": 77}, {"num_suffix_tokens": 130}, {"num_prefix_tokens": 5, "num_suffix_tokens": 9}])
def test_text_stays_whole(sizes: dict[str, int]) -> None:
    length = 3 * 24 * 20 + sum(sizes.values())
    q, k, v = (draw(1, length, 2, 32, seed=i) for i in range(3))
    out, record = call(PermutedSparseAttentionBackend, q, k, v, (3, 24, 20), skip_first_steps=0, sparsity=0.7, **sizes)
    mask = record.plan.to_mask()
    text = torch.arange(mask.shape[-1]) >= 1440 // 128
    assert bool(mask[..., text].all())
    assert bool(mask[:, :, text].all())
    first = sizes.get("num_prefix_tokens", 0)
    exact = oracle.attention(q[:, :first], k, v)[0] if first else oracle.attention(q[:, 1440:], k, v)[0]
    found = out[:, :first] if first else out[:, 1440:]
    assert judge.relative_error(found, exact) < 2e-6, "text queries see every key"


def test_padding_counts_for_nothing() -> None:
    """Suffix text padded to 130 tokens, of which 40 are real."""
    length, real = 1440 + 130, 1440 + 40
    q, k, v = (draw(1, length, 2, 32, seed=i) for i in range(3))
    fields: dict[str, Any] = {
        "num_suffix_tokens": 130,
        "key_lengths": torch.tensor([real]),
        "known_key_lengths": (real,),
        "sparsity": 0.7,
        "skip_first_steps": 0,
    }
    out, record = call(PermutedSparseAttentionBackend, q, k, v, (3, 24, 20), **fields)
    k[:, real:], v[:, real:] = 1e4, torch.nan
    again, _ = call(PermutedSparseAttentionBackend, q, k, v, (3, 24, 20), **fields)
    assert record.reason is None
    assert torch.equal(out[:, :real], again[:, :real])


def test_one_frame_and_few_frames_run() -> None:
    for grid in ((1, 30, 44), (2, 24, 32), (4, 20, 20)):
        length = grid[0] * grid[1] * grid[2]
        q, k, v = (draw(1, length, 2, 32, seed=i) for i in range(3))
        out, record = call(PermutedSparseAttentionBackend, q, k, v, grid, skip_first_steps=0, sparsity=0.5)
        assert record.reason is None
        assert out.isfinite().all()
        assert record.plan.density() < 0.75


def test_causal_is_refused() -> None:
    with pytest.raises(UnsupportedCall, match="does not support causal"):
        PermutedSparseAttentionBackend.get_impl_cls()(2, 32, None, True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"brick": "4x2x16"}, "did you mean 'bricks'"),
        ({"bricks": "4x2"}, "not of the form"),
        ({"bricks": ""}, "at least one shape"),
        ({"token_order": "tile"}, "token_order"),
        ({"tails": True}, "did you mean 'tail'"),
    ],
)
def test_keys_are_checked(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PermutedSparseAttentionConfig.from_mapping(keys)


@pytest.mark.parametrize("tail", [True, False])
def test_the_reported_implementation_is_chosen_for_calls_with_the_tail(tail: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some operators take sparse calls but no tail: the report must not name them."""
    asked: list[CallFacts] = []

    def watched(table: Any, facts: CallFacts, *names: Any) -> Any:
        asked.append(facts)
        return choose(table, facts, *names)

    monkeypatch.setattr(impl, "choose", watched)
    x = draw(1, 1440, 2, 32)
    built = PermutedSparseAttentionBackend.get_builder_cls()().build(
        current_timestep=9, raw_latent_shape=(1, 4, 3, 24, 20), patch_size=1, num_steps=20, tail=tail
    )
    Layer(2, 32).impl.rows(x, x, x, built)
    assert ("tail" in asked[0].needs) is tail
