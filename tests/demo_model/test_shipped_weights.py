"""The weights in the package: even pure noise shows the object where direction and time put it, and whole clips are what they were told."""

from __future__ import annotations

import pytest
import torch

from demo_model import forward, world
from demo_model.autoencoder import LatentMap
from demo_model.judge import judge
from demo_model.sample import draw_clips, load
from ditattn.hosts.diffusers.demo_model import TRAINED

FRAMES = torch.tensor([0, 4, 8, 12, 16])


@pytest.fixture(scope="module")
def pipe():
    return load(TRAINED, torch.float32)


@torch.no_grad()
def guess_centres(pipe, caption: str, color: str, background: str) -> torch.Tensor:
    """Centre (x, y) in pixels of what the model sees in pure noise, frame by frame: [T, 2], mean over four noises."""
    tokens = pipe.tokenizer([caption] * 4, return_tensors="pt")
    noise = torch.randn(4, 12, len(FRAMES), 32, 32, generator=torch.Generator().manual_seed(0))
    networks = (pipe.transformer, pipe.text_encoder)
    velocity = forward.velocity(*networks, noise, torch.ones(4), tokens.input_ids, tokens.attention_mask, 20.0, FRAMES)
    video = LatentMap(pipe.vae).decode(noise - velocity).mean(0)
    colors = dict(zip(world.COLORS, world.palette(), strict=True))
    towards = colors[color] - colors[background]
    # 0 where there is background, 1 where there is object
    share = ((video - colors[background].view(3, 1, 1, 1)) * towards.view(3, 1, 1, 1)).sum(0) / towards.square().sum()
    weight, axis = share.clamp(min=0), torch.arange(world.SIZE_PX) + 0.5
    return torch.stack([weight.sum(1) @ axis, weight.sum(2) @ axis], -1) / weight.sum((1, 2))[:, None]


@pytest.mark.parametrize("direction", world.DIRECTIONS)
def test_direction_and_time_place_the_object_in_pure_noise(pipe, direction):
    scene = next(s for s in world.held_out_scenes() if s.direction == direction)
    centres = guess_centres(pipe, world.caption(scene), scene.color, scene.background)
    moved = centres[-1] - centres[0]
    way = torch.tensor(world.DIRECTIONS[direction], dtype=torch.float32)
    # 16 px are drawn; what is seen in pure noise is the blurred mean of all such clips
    along = moved @ way
    assert along > 3
    assert (moved - along * way).norm() < along


# of nine frames four steps make a clip that the judge finds right in every respect, for a sixth of the time
@pytest.mark.slow
@pytest.mark.parametrize(("number", "frames", "steps"), [(0, 9, 4), pytest.param(1, 17, 12, marks=pytest.mark.long)])
def test_a_held_out_clip_is_what_its_caption_tells(pipe, number, frames, steps):
    scene = world.held_out_scenes()[number]
    verdict = judge(draw_clips(pipe, [world.caption(scene)], seed=number, frames=frames, steps=steps)[0])
    assert verdict.agrees(scene) == dict.fromkeys(("present", "color", "background", "direction", "shape"), True)
