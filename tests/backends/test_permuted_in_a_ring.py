"""permuted_sparse_attn on ranks of a ring: blocks of queries are those of one process, and so is what heads choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ditattn.backends.base import CallRecord
from ditattn.backends.permuted_sparse_attn import PermutedSparseAttentionBackend, refresh_steps
from ditattn.plan.reuse import ForwardId
from ditattn.plan.split import GatheredRows, GatheredTokens
from sparse_calls import draw
from thread_ring import in_threads

GRID = (17, 16, 16)
LENGTH = 17 * 16 * 16


def planted() -> tuple[Tensor, Tensor, Tensor]:
    """Two heads: one sees its own frame, the other its own place in all frames, of which a rank has some."""
    token = torch.arange(LENGTH)
    frames, places = draw(17, 32, seed=3), draw(256, 32, seed=4)
    keys = torch.stack([2.0 * frames[token // 256], 2.0 * places[token % 256]], 1).unsqueeze(0)
    return keys, keys.clone(), draw(1, LENGTH, 2, 32, seed=5)


def steps(
    tensors: tuple[Tensor, Tensor, Tensor], numbers: range, grid: tuple[int, int, int] = GRID, **fields: Any
) -> tuple[Tensor, list[CallRecord]]:
    """The result of the last of some steps, and what all of them recorded."""
    records: list[CallRecord] = []
    heads, size = tensors[0].shape[2:]
    impl = PermutedSparseAttentionBackend.get_impl_cls()(heads, size, layer_index=0, observer=records.append)
    keys = {"sparsity": 0.9, "skip_first_steps": 2, "num_steps": 20, "residual": False, **fields}
    build = PermutedSparseAttentionBackend.get_builder_cls()().build
    for step in numbers:
        out = impl.forward(*tensors, build(current_timestep=step, raw_latent_shape=(1, 4, *grid), patch_size=1, **keys))
    return out, records


@pytest.mark.parametrize("numbers", [range(1, 3), range(2, 3)], ids=["measured", "estimated"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_ring_comes_as_near_to_dense_as_one_process(ranks: int, numbers: range) -> None:
    query, key, value = planted()
    dense = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    alone, of_alone = steps((query, key, value), numbers)

    def take_part(rows: GatheredRows) -> tuple[Tensor, list[CallRecord], Tensor]:
        own = rows.tokens()
        return *steps((query[:, own], key, value), numbers, rows=rows), own

    together = torch.empty_like(dense)
    found = in_threads(ranks, GatheredTokens((LENGTH,), ranks), take_part)
    for out, records, own in found:
        together[:, own] = out
        assert records[-1].token_orders == of_alone[-1].token_orders
        assert not records[-1].own_blocks
    error, expected = (float((out - dense).square().sum()) for out in (together, alone))
    # by blocks of a rank's own rows the error is 2 to 6 times as large
    assert error < 1.25 * expected
    kept = [records[-1].plan.to_mask().sum() for _, records, _ in found]
    assert max(kept) <= 1.1 * sum(kept) / ranks + 2 * 34


def test_more_ranks_than_blocks_in_the_sample_choose_alike() -> None:
    query, key, value = planted()
    # whether residuals are kept is agreed on too, and not within the choice, from which some have nothing to tell
    fields = {"residual": "auto", "forward_id": ForwardId(run=1)}
    _, of_alone = steps((query, key, value), range(1, 3), **fields)
    refresh_steps._all_have_room.cache_clear()

    def take_part(rows: GatheredRows) -> list[CallRecord]:
        return steps((query[:, rows.tokens()], key, value), range(1, 3), rows=rows, **fields)[1]

    for records in in_threads(16, GatheredTokens((LENGTH,), 16), take_part):
        assert records[0].token_orders == of_alone[0].token_orders is not None


def test_a_host_that_cannot_exchange_rows_has_blocks_of_a_ranks_own() -> None:
    query, key, value = planted()
    rows = GatheredRows(GatheredTokens((LENGTH,), 4), 1, 1)
    out, records = steps((query[:, rows.tokens()], key, value), range(2, 3), rows=rows)
    assert out.shape[1] == LENGTH // 4
    assert records[-1].own_blocks


def test_a_ring_of_more_ranks_than_blocks_has_blocks_of_a_ranks_own() -> None:
    tensors = tuple(draw(1, 256, 2, 32, seed=seed) for seed in range(3))

    def take_part(rows: GatheredRows) -> tuple[Tensor, list[CallRecord]]:
        own = (tensors[0][:, rows.tokens()], *tensors[1:])
        return steps(own, range(2, 3), (2, 8, 16), rows=rows)

    for out, records in in_threads(4, GatheredTokens((256,), 4), take_part):
        assert out.shape == (1, 64, 2, 32)
        assert records[-1].own_blocks


@pytest.mark.parametrize("room", [[True, True], [True, False]])
def test_ranks_keep_residuals_where_all_have_room(monkeypatch: pytest.MonkeyPatch, room: list[bool]) -> None:
    answers = iter(room)
    monkeypatch.setattr(refresh_steps, "_has_room", lambda *_: next(answers))
    refresh_steps._all_have_room.cache_clear()
    query, key, value = (draw(1, 1024, 2, 32, seed=seed) for seed in range(3))

    def take_part(rows: GatheredRows) -> list[str | None]:
        own = (query[:, rows.tokens()], key, value)
        keys = {"skip_first_steps": 4, "sparsity": 0.5, "residual": "auto", "forward_id": ForwardId(run=1)}
        _, records = steps(own, range(3, 12), (4, 16, 16), rows=rows, **keys)
        return [record.reason for record in records]

    first, second = in_threads(2, GatheredTokens((1024,), 2), take_part)
    refresh_steps._all_have_room.cache_clear()
    assert first == second
    assert ("refresh step" in first) == all(room)
