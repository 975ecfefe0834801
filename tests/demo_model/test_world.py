"""The world: what is held out stays out, captions are complete, and pictures are the same every time."""

import random
from collections import Counter

import torch

from demo_model import world
from demo_model.build import build_tokenizer


def test_held_out_scenes_are_never_trained_on():
    held_out, trained = world.held_out_scenes(), world.training_scenes()
    assert len(held_out) == world.NUM_HELD_OUT
    assert not set(held_out) & set(trained)
    assert set(held_out) | set(trained) == set(world.all_scenes())
    captions = {world.caption(scene, big) for scene in trained for big in (True, False)}
    assert not captions & {world.caption(scene, big) for scene in held_out for big in (True, False)}


def test_first_twenty_held_out_scenes_use_every_word():
    scenes = world.held_out_scenes()[:20]
    for name, values in (("color", world.COLORS), ("background", world.COLORS), ("shape", world.SHAPES), ("direction", world.DIRECTIONS)):
        counts = Counter(getattr(scene, name) for scene in scenes)
        assert set(counts) == set(values), name


def test_every_pair_of_words_is_trained_on():
    trained = world.training_scenes()
    for first, second in (("color", "shape"), ("color", "direction"), ("shape", "direction"), ("color", "background")):
        wanted = {(getattr(scene, first), getattr(scene, second)) for scene in world.all_scenes()}
        assert {(getattr(scene, first), getattr(scene, second)) for scene in trained} == wanted


def test_tokenizer_knows_every_word_of_every_caption():
    tokenizer = build_tokenizer()
    captions = [world.caption(scene, big) for scene in world.all_scenes() for big in (True, False)]
    ids = tokenizer(captions, padding="max_length", max_length=12).input_ids
    assert all(len(row) == 12 and tokenizer.unk_token_id not in row for row in ids)
    assert len({tuple(row) for row in ids}) == len(captions)


def test_clips_are_the_same_for_the_same_seed():
    scene = world.all_scenes()[7]
    first, second, other = (world.place(scene, random.Random(seed)) for seed in (3, 3, 4))
    assert first == second != other
    assert torch.equal(world.render([first], torch.arange(5))[0], world.render([second], torch.arange(5))[0])


def test_frames_do_not_depend_on_which_others_are_drawn():
    clip = world.place(world.all_scenes()[100], random.Random(0))
    every = world.render([clip], torch.arange(17))[0]
    some = world.render([clip], torch.tensor([0, 4, 16]))[0]
    assert torch.equal(some, every[:, :, [0, 4, 16]])


def test_the_object_stays_inside_for_a_whole_clip():
    clips = [world.place(scene, random.Random(seed)) for seed, scene in enumerate(world.all_scenes())]
    # it moves in a straight line: what is inside in the first and in the last frame is inside between them
    frames = torch.arange(0, world.CLIP_FRAMES, 4)
    assert frames[-1] == world.CLIP_FRAMES - 1
    mask = world.render(clips, frames)[1]
    # a corner of the widest triangle may touch a pixel of the border
    assert max(float(edge.max()) for edge in (mask[..., 0, :], mask[..., -1, :], mask[..., 0], mask[..., -1])) < 0.5
    assert mask[..., 32, 32].mean() > 0.9


def test_the_object_keeps_its_area_round_the_edges():
    scenes = [scene for scene in world.all_scenes() if (scene.color, scene.background) == ("red", "blue")]
    clips = [world.place(scene, random.Random(seed), wraps=True) for seed, scene in enumerate(scenes)]
    areas = world.render(clips, torch.arange(0, 64, 5))[1].sum((1, 3, 4))
    assert (areas / areas[:, :1] - 1).abs().max() < 0.02


def test_the_object_moves_the_way_its_caption_says():
    for name, (step_x, step_y) in world.DIRECTIONS.items():
        clip = world.Clip(world.Scene("red", "circle", name, "blue"), (32.0, 32.0), 8.0)
        mask = world.render([clip], torch.tensor([0, 4]))[1][0, 0]
        axis = torch.arange(64) + 0.5
        moved_x = ((mask[1].sum(0) - mask[0].sum(0)) @ axis) / mask[0].sum()
        moved_y = ((mask[1].sum(1) - mask[0].sum(1)) @ axis) / mask[0].sum()
        torch.testing.assert_close(torch.stack([moved_x, moved_y]), torch.tensor([step_x, step_y]) * 4 * world.SPEED_PX, atol=0.05, rtol=0)


def test_centres_are_those_of_the_drawn_object():
    scenes = [scene for scene in world.all_scenes() if (scene.color, scene.background, scene.shape) == ("red", "blue", "circle")]
    clips = [world.place(scene, random.Random(seed)) for seed, scene in enumerate(scenes)]
    frames = torch.tensor([0, 5, 16])
    mask = world.render(clips, frames)[1][:, 0]
    axis, area = torch.arange(64) + 0.5, mask.sum((2, 3))
    drawn = torch.stack([(mask.sum(2) @ axis) / area, (mask.sum(3) @ axis) / area], -1)
    torch.testing.assert_close(world.centres(clips, frames), drawn, atol=0.05, rtol=0)
