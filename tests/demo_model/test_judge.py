"""The judge against clips drawn by the renderer: it must believe the true ones and none of the wrong ones."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from demo_model import world
from demo_model.judge import judge, largest_component, shares_right


def draw(scene: world.Scene, seed: int = 0, frames: int = 17, size_px: int = 64) -> np.ndarray:
    clip = world.place(scene, random.Random(seed))
    video, _ = world.render([clip], torch.arange(frames), size_px)
    return ((video[0].permute(1, 2, 3, 0) + 1) / 2).numpy()


def other(scene: world.Scene, question: str) -> world.Scene:
    names = {"shape": world.SHAPES, "direction": tuple(world.DIRECTIONS)}.get(question, tuple(world.COLORS))
    taken = {scene.color, scene.background} if question in ("color", "background") else {getattr(scene, question)}
    return replace(scene, **{question: next(name for name in names if name not in taken)})


def test_drawn_clips_are_right_in_every_respect():
    scenes = world.held_out_scenes()[:20]
    verdicts = [judge(draw(scene, seed)) for seed, scene in enumerate(scenes)]
    assert set(shares_right(verdicts, scenes).values()) == {1.0}
    assert min(verdict.overlap for verdict in verdicts) > 0.85
    assert max(verdict.stray_share for verdict in verdicts) < 0.05


@pytest.mark.parametrize("question", ["color", "background", "direction", "shape"])
def test_one_wrong_thing_is_the_only_thing_found_wrong(question):
    for seed, scene in enumerate(world.held_out_scenes()[:6]):
        answers = judge(draw(other(scene, question), seed)).agrees(scene)
        assert [name for name, right in answers.items() if not right] == [question]


def test_an_empty_clip_and_a_flooded_clip_show_no_object():
    scene = world.held_out_scenes()[0]
    empty = np.broadcast_to(np.array(world.COLORS[scene.background]) / 255, (17, 64, 64, 3))
    flooded = empty.copy()
    flooded[:, :30] = np.array(world.COLORS[scene.color]) / 255
    for video in (empty, flooded):
        verdict = judge(video)
        assert not verdict.present
        assert [name for name, right in verdict.agrees(scene).items() if right] == ["background"]


def test_an_object_in_too_few_frames_is_absent():
    scene = world.held_out_scenes()[1]
    video = draw(scene)
    video[:5] = np.array(world.COLORS[scene.background]) / 255
    assert not judge(video).present


def test_a_still_object_has_no_direction():
    video = draw(world.held_out_scenes()[2])
    assert judge(np.repeat(video[:1], 17, 0)).direction is None


def test_noise_of_a_tenth_of_the_range_changes_nothing():
    scenes = world.held_out_scenes()[:6]
    noise = np.random.default_rng(0).normal(0, 0.1, (17, 64, 64, 3))
    verdicts = [judge((draw(scene, seed) + noise).clip(0, 1)) for seed, scene in enumerate(scenes)]
    assert set(shares_right(verdicts, scenes).values()) == {1.0}


def test_a_ragged_blob_has_no_shape():
    scene = world.held_out_scenes()[3]
    front, back = (np.array(world.COLORS[name]) / 255 for name in (scene.color, scene.background))
    arms = np.zeros((64, 64), bool)
    arms[30:34, 8:56] = arms[8:56, 30:34] = True
    verdict = judge(np.broadcast_to(np.where(arms[..., None], front, back), (5, 64, 64, 3)))
    assert verdict.present
    assert verdict.shape is None


def test_components_join_across_the_edge_and_not_across_a_corner():
    mask = np.zeros((1, 6, 6), bool)
    mask[0, 2, [0, 5]] = True
    mask[0, 3, 1] = True
    assert largest_component(mask).sum() == 2
