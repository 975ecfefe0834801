"""Means of blocks as the mean query weighs them, against the sums spelled out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditattn.backends.selection.weighted_means import weighted_tail
from ditattn.plan.block_plan import BLOCK_SIZE
from ditattn.plan.bricks import brick_order
from ditattn.plan.token_order import TokenOrder, token_order
from sparse_calls import draw

SCALE = 0.3


def raster(length: int) -> TokenOrder:
    return token_order("raster", (1, 1, length))


def sums(mean_query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Of one head in float64: every block's logarithm of its whole weight for the mean query `[N]`, and its weighted value `[N, D]`."""
    weights = [(SCALE * block.double() @ mean_query.double()).exp() for block in k.split(BLOCK_SIZE)]
    values = [w @ block.double() / w.sum() for w, block in zip(weights, v.split(BLOCK_SIZE), strict=True)]
    return torch.stack([w.sum().log() for w in weights]), torch.stack(values)


@pytest.mark.parametrize("length", [256, 300, 90])
@pytest.mark.parametrize("times", [1.0, 20.0])
def test_weight_and_value_are_exact_for_the_mean_query(length: int, times: float) -> None:
    k, v = draw(2, length, 2, 32, seed=1), draw(2, length, 2, 32, seed=2)
    mean_query = times * draw(2, 2, 1, 32, seed=3)[:, :, 0]
    tail = weighted_tail(mean_query, k, v, raster(length), None, SCALE)
    for b in range(2):
        for h in range(2):
            log_weight, value = sums(mean_query[b, h], k[b, :, h], v[b, :, h])
            found = SCALE * tail.key[b, :, h] @ mean_query[b, h] + tail.counts[0].log()
            torch.testing.assert_close(found.double(), log_weight, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(tail.value[b, :, h].double(), value, rtol=1e-4, atol=1e-4)


def test_a_mean_query_that_says_nothing_gives_plain_means() -> None:
    k, v = draw(1, 300, 1, 32, seed=1), draw(1, 300, 1, 32, seed=2)
    for times in (0.0, 1e-4, 1e-8):
        tail = weighted_tail(times * torch.ones(1, 1, 32), k, v, raster(300), None, SCALE)
        for found, x in ((tail.key, k), (tail.value, v)):
            plain = torch.stack([block.mean(0) for block in x[0].split(BLOCK_SIZE)])
            torch.testing.assert_close(found[0], plain, rtol=0, atol=2e-3)


def test_padded_keys_count_for_nothing() -> None:
    k, v = draw(2, 517, 2, 32, seed=1), draw(2, 517, 2, 32, seed=2)
    mean_query = draw(2, 2, 1, 32, seed=3)[:, :, 0]
    lengths = torch.tensor([300, 517])
    k[0, 300:], v[0, 300:] = torch.nan, torch.inf
    tail = weighted_tail(mean_query, k, v, raster(517), lengths, SCALE)
    short = weighted_tail(mean_query[:1], k[:1, :300], v[:1, :300], raster(300), None, SCALE)
    assert tail.counts.tolist() == [[128, 128, 44, 0, 0], [128, 128, 128, 128, 5]]
    torch.testing.assert_close(tail.key[:1, :3], short.key, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tail.value[:1, :3], short.value, rtol=1e-4, atol=1e-4)
    assert tail.key.isfinite().all()
    assert tail.value.isfinite().all()


def test_every_head_has_its_own_order() -> None:
    grid = (5, 16, 16)
    k, v = draw(1, 1280, 2, 32, seed=1), draw(1, 1280, 2, 32, seed=2)
    mean_query = draw(1, 2, 1, 32, seed=3)[:, :, 0]
    one, other = brick_order((4, 2, 16), grid), brick_order((1, 8, 16), grid)
    both = TokenOrder(
        torch.stack([one.forward, other.forward]), torch.stack([one.inverse, other.inverse]), one.first_frame, one.video, 1280
    )
    for lengths in (None, torch.tensor([1000])):
        tail = weighted_tail(mean_query, k, v, both, lengths, SCALE)
        for head, order in enumerate((one, other)):
            part = slice(head, head + 1)
            alone = weighted_tail(mean_query[:, part], k[:, :, part], v[:, :, part], order, lengths, SCALE)
            torch.testing.assert_close(tail.key[:, :, part], alone.key, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(tail.value[:, :, part], alone.value, rtol=1e-4, atol=1e-4)
