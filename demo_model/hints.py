"""Hints for training: what a token should know of its clip, read off linearly after every block but the first.

Where the object is depends on the caption's direction and the frame's time together. A network that sees neither gains nothing by
seeing one of them, so the picture alone teaches neither. Asked for both, and for the place that follows from them, it learns them
in some hundred steps. The readouts serve training only; the pipeline has none.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from demo_model import world

# of cross_entropy: no class to compare with
UNTOLD = -100
DIRECTION_SHARE = 0.2


class Truth(NamedTuple):
    """Frame times [T] and places of the object's centre [B, T, 2], both about -1..1; directions [B], `UNTOLD` where no caption tells."""

    times: Tensor
    places: Tensor
    directions: Tensor


def truth(clips: Sequence[world.Clip], frames: Tensor, captions: Sequence[str]) -> Truth:
    """What is true of B clips at the frame times `frames` [T]: in units of half a clip, and of the way an object moves in it."""
    half = (world.CLIP_FRAMES - 1) / 2
    names = list(world.DIRECTIONS)
    ways = [names.index(clip.scene.direction) if caption else UNTOLD for clip, caption in zip(clips, captions, strict=True)]
    places = (world.centres(clips, frames) - world.SIZE_PX / 2) / (half * world.SPEED_PX)
    return Truth(frames / half - 1, places, torch.tensor(ways))


class Hints(torch.nn.Module):
    """One linear readout per block but the first: frame time, place and direction."""

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        num_answers = 3 + len(world.DIRECTIONS)
        self.readouts = torch.nn.ModuleList(torch.nn.Linear(width, num_answers) for _ in range(num_blocks - 1))

    def forward(self, hidden: Sequence[Tensor], truth: Truth) -> Tensor:
        """Mean error of the readouts of `hidden`, the output [B, T N, C] of every block.

        Time and place are asked of each token, the squared error counts; the direction is asked of the mean token of a clip.
        """
        errors = [self._error(readout, h, truth) for readout, h in zip(self.readouts, hidden[1:], strict=True)]
        return torch.stack(errors).mean() if errors else hidden[0].new_zeros((), dtype=torch.float32)

    def _error(self, readout: torch.nn.Module, hidden: Tensor, truth: Truth) -> Tensor:
        tokens = hidden.float().unflatten(1, (len(truth.times), -1))
        answer = readout(F.layer_norm(tokens, tokens.shape[-1:]))
        time, place, direction = answer.split([1, 2, len(world.DIRECTIONS)], -1)
        time_error = (time - truth.times.view(1, -1, 1, 1)).square().mean()
        place_error = (place - truth.places[:, :, None]).square().sum(-1).mean()
        # a sum, since the mean of no told clip at all is not a number
        direction_error = F.cross_entropy(direction.mean((1, 2)), truth.directions, ignore_index=UNTOLD, reduction="sum")
        return time_error + place_error + DIRECTION_SHARE * direction_error / len(hidden)
