"""Training: the same seed gives the same weights, through an interruption too, and a few steps lower the loss."""

import random

import pytest
import torch

from demo_model import world
from demo_model.autoencoder import LatentMap
from demo_model.build import build_pipeline
from demo_model.hints import UNTOLD
from demo_model.train import (
    DECISIVE_SHIFT,
    Stage,
    Trainer,
    draw_batch,
    draw_sigma,
    lr_factor_at,
    object_weights,
    parse_stages,
    run,
    stage_at,
)

STAGE = Stage(steps=4, clips=2, frames=1)


def tiny_trainer(seed: int = 0) -> Trainer:
    # two blocks: the hints begin after the second
    return Trainer(build_pipeline(seed=0, num_layers=2, num_heads=2, ffn_dim=64), seed, object_factor=4.0)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for nets in (trainer.nets, trainer.averages, trainer.hints) for p in nets.parameters()])


def test_interrupted_training_ends_at_the_same_weights(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    straight.mkdir()
    broken.mkdir()
    whole = tiny_trainer()
    run(whole, [STAGE], straight, decay_steps=2, save_minutes=60)
    first = tiny_trainer()
    for _ in range(2):
        first.train_step(STAGE, lr_factor_at(first.step, 4, 2))
    first.save(broken)
    second = tiny_trainer()
    second.resume(broken)
    assert second.step == 2
    run(second, [STAGE], broken, decay_steps=2, save_minutes=60)
    assert torch.equal(weights(whole), weights(second))


def test_another_seed_trains_other_weights():
    one, two = tiny_trainer(seed=0), tiny_trainer(seed=1)
    losses = [trainer.train_step(STAGE, 1.0)[0] for trainer in (one, two)]
    assert losses[0] != losses[1]
    assert not torch.equal(weights(one), weights(two))


def test_a_few_steps_lower_both_losses():
    trainer, stage = tiny_trainer(), Stage(steps=12, clips=4, frames=1)
    with torch.no_grad():
        before = torch.stack(trainer.losses(stage))
    for _ in range(12):
        trainer.train_step(stage, 1.0)
    # step 0 again: the same clips, noise and noise levels
    trainer.step = 0
    with torch.no_grad():
        picture, hint = torch.stack(trainer.losses(stage)) / before
    assert picture < 0.8
    assert hint < 0.95


def test_batches_hold_training_scenes_at_the_frames_of_the_stage():
    pipe = build_pipeline(seed=0, num_layers=1, num_heads=2, ffn_dim=64)
    captions = [world.caption(scene, big) for scene in world.held_out_scenes() for big in (True, False)]
    latent_map, held_out = LatentMap(pipe.vae), {str(pipe.tokenizer(caption).input_ids) for caption in captions}
    for step in range(15):
        batch = draw_batch(Stage(1, 3, 5, stride=4), random.Random(step), pipe.tokenizer, latent_map, 4.0)
        assert batch.frames.tolist() == [0, 4, 8, 12, 16]
        assert batch.latents.shape == (3, 12, 5, 32, 32)
        assert batch.weights.shape == (3, 1, 5, 32, 32)
        assert held_out.isdisjoint(str(row[mask > 0].tolist()) for row, mask in zip(batch.ids, batch.mask, strict=True))
        untold = [mask.sum() == 1 for mask in batch.mask]
        assert [way == UNTOLD for way in batch.truth.directions] == untold


def test_object_weights_cover_the_object_and_its_border():
    mask = torch.zeros(1, 1, 1, 16, 16)
    mask[..., 6:8, 6:8] = 1
    expected = torch.ones(8, 8)
    expected[2:5, 2:5] = 4
    found = object_weights(mask, 4.0)[0, 0, 0]
    assert found[3, 3] == 4
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shift", [1.0, 10.0])
def test_sigmas_lie_in_range_and_shift_towards_noise(shift):
    sigma = draw_sigma(20000, shift, torch.Generator().manual_seed(0))
    assert 0 < sigma.min() < sigma.max() <= 1
    # the 30 % that are uniform before the shift, and the others, symmetrical about a half before theirs
    middle, further = shift / (shift + 1), DECISIVE_SHIFT * shift / (DECISIVE_SHIFT * shift + 1)
    assert middle < sigma.median() < further
    assert abs((sigma < further).float().mean() - (0.7 * 0.5 + 0.3 * DECISIVE_SHIFT / (DECISIVE_SHIFT + 1))) < 0.02


def test_stages_follow_each_other():
    stages = parse_stages("3x16x1,2x8x2@16")
    assert stages == [Stage(3, 16, 1, stride=1), Stage(2, 8, 2, stride=16)]
    assert [stage_at(stages, step) for step in (0, 2, 3, 4, 5)] == [stages[0], stages[0], stages[1], stages[1], None]


def test_learning_rate_rises_holds_and_falls():
    factors = [lr_factor_at(step, 1000, 100) for step in (0, 50, 500, 899, 950, 999)]
    assert factors[0] < 0.03
    assert factors[1:4] == [1.0, 1.0, 1.0]
    assert 1 > factors[4] > factors[5] > 0.05
