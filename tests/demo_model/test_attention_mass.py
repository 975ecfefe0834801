"""The measure of concentration on attention whose mass is known."""

import pytest
import torch

from demo_model.attention_mass import best_share, block_mass


def test_equal_logits_spread_mass_evenly():
    mass = block_mass(torch.zeros(1, 2, 32, 8), torch.randn(1, 2, 32, 8), block=4)
    torch.testing.assert_close(mass, torch.full((1, 2, 8, 8), 1 / 8))
    assert best_share(mass) == pytest.approx(0.25)


def test_queries_that_see_one_block_put_all_mass_there():
    blocks = torch.eye(8).repeat_interleave(4, 0)[None, None] * 100
    mass = block_mass(blocks, blocks, block=4)
    torch.testing.assert_close(mass, torch.eye(8)[None, None], atol=1e-6, rtol=0)
    assert best_share(mass) == pytest.approx(1.0)


def test_known_mass_is_counted():
    mass = torch.tensor([0.4, 0.3, 0.2, 0.1]).view(1, 1, 1, 4)
    assert best_share(mass, 0.5) == pytest.approx(0.7)
    assert best_share(mass, 0.25) == pytest.approx(0.4)
