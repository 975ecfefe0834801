"""Hints: the truth about a clip, and an error that is zero only for readouts that tell it."""

import torch

from demo_model import world
from demo_model.hints import UNTOLD, Hints, truth

FRAMES = torch.tensor([0, 8, 16])
WAYS = list(world.DIRECTIONS)


def clips(*directions: str) -> list[world.Clip]:
    return [world.Clip(world.Scene("red", "circle", way, "blue"), (28.0, 32.0), 18.0) for way in directions]


def test_truth_of_a_clip():
    found = truth(clips("right", "up"), FRAMES, ["a caption", ""])
    assert found.times.tolist() == [-1, 0, 1]
    # 28 + 8 px to the right of 32, in units of 8 px; up is towards smaller rows
    assert found.places[0].tolist() == [[-0.5, 0], [0.5, 0], [1.5, 0]]
    assert found.places[1].tolist() == [[-0.5, 0], [-0.5, -1], [-0.5, -2]]
    assert found.directions.tolist() == [WAYS.index("right"), UNTOLD]


def readable(answers: torch.Tensor, num_tokens: int = 2) -> tuple[Hints, torch.Tensor]:
    """Hints that read the first seven channels, and a hidden state [B, T N, 32] of mean 0 and variance 1 that holds `answers` [B, T, 7]."""
    hidden = torch.cat([answers, -answers, torch.zeros(*answers.shape[:2], 18)], -1)
    fill = (32 - hidden.square().sum(-1)) / 2
    hidden[..., -2], hidden[..., -1] = fill.sqrt(), -fill.sqrt()
    hints = Hints(32, 2)
    with torch.no_grad():
        hints.readouts[0].weight.copy_(torch.eye(7, 32))
        hints.readouts[0].bias.zero_()
    return hints, hidden.repeat_interleave(num_tokens, 1)


def told(directions: tuple[str, ...], captions: list[str]):
    asked = truth(clips(*directions), FRAMES, captions)
    sure = torch.tensor([[1.0 if way == other else -1.0 for other in WAYS] for way in directions])
    parts = [asked.times.view(1, 3, 1).expand(len(directions), 3, 1), asked.places, sure[:, None].expand(-1, 3, -1)]
    return asked, torch.cat(parts, -1)


def test_readouts_that_tell_the_truth_have_the_least_error():
    asked, answers = told(("right",), ["a caption"])
    hints, hidden = readable(answers)
    least = hints([torch.randn(1, 6, 32), hidden], asked).item()
    for channel in range(7):
        wrong = answers.clone()
        wrong[..., channel] *= -1
        wrong[..., channel] += 0.1
        hints, hidden = readable(wrong)
        assert hints([torch.randn(1, 6, 32), hidden], asked).item() > least + 0.005, channel


def test_a_clip_without_a_caption_is_not_asked_for_its_direction():
    asked, answers = told(("left",), [""])
    hints, hidden = readable(answers)
    torch.testing.assert_close(hints([hidden, hidden], asked).item(), 0.0, atol=1e-4, rtol=0)


def test_one_block_has_nothing_to_ask():
    asked, answers = told(("left",), [""])
    error = Hints(32, 1)([readable(answers)[1]], asked)
    assert error.item() == 0
