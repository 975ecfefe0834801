"""A toy world of captioned clips: one big shape glides over a plain background, whole in every frame.

A `Scene` is what a caption says; `place` adds where the shape starts; `render` draws it at any frame times, so a training
batch can take frames 0, 4 and 8 of a clip without drawing those between.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SIZE_PX = 64
RADIUS_PX = 18.0
RADIUS_JITTER_PX = 0.5
SPEED_PX = 1.0
# the widest shape reaches this far from its centre, to the side
REACH_PX = 21.6
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 215, 50),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# what the pipeline draws by default, and the span that training sees
CLIP_FRAMES = 17
NUM_HELD_OUT = 40
HELD_OUT_SEED = 2024


@dataclass(frozen=True)
class Scene:
    """What a caption tells of a clip."""

    color: str
    shape: str
    direction: str
    background: str


@dataclass(frozen=True)
class Clip:
    """A scene with everything the caption leaves open: centre at frame 0 and radius, in pixels of a 64-pixel picture."""

    scene: Scene
    start_px: tuple[float, float]
    radius_px: float


def all_scenes() -> list[Scene]:
    """Every scene the captions can tell, in a fixed order."""
    pairs = itertools.permutations(COLORS, 2)
    return [Scene(color, shape, way, background) for (color, background), shape, way in itertools.product(pairs, SHAPES, DIRECTIONS)]


def held_out_scenes() -> list[Scene]:
    """The scenes that training never sees, in the order in which evaluation takes them.

    Dealt so that every colour, background, shape and direction comes up about equally often: scenes are shuffled once, then
    taken in turn by shape and direction.
    """
    scenes = all_scenes()
    random.Random(HELD_OUT_SEED).shuffle(scenes)
    piles = [[s for s in scenes if (s.shape, s.direction) == key] for key in itertools.product(SHAPES, DIRECTIONS)]
    return [scene for row in zip(*piles, strict=True) for scene in row][:NUM_HELD_OUT]


def training_scenes() -> list[Scene]:
    """Every scene that is not held out."""
    held_out = set(held_out_scenes())
    return [scene for scene in all_scenes() if scene not in held_out]


def caption(scene: Scene, big: bool = True) -> str:
    """The sentence for a scene; every shape is big, so the word may be left out."""
    size = "big " if big else ""
    return f"a {size}{scene.color} {scene.shape} moves {scene.direction} on a {scene.background} background"


def place(scene: Scene, rng: random.Random, wraps: bool = False) -> Clip:
    """Choose radius and start so that the shape stays inside the picture for `CLIP_FRAMES` frames.

    With `wraps` every start is equally likely: shapes leave at one edge and enter at the other.
    """
    travels = [0.0 if wraps else step * SPEED_PX * (CLIP_FRAMES - 1) for step in DIRECTIONS[scene.direction]]
    reach = 0.0 if wraps else REACH_PX
    start = (
        rng.uniform(reach - min(0, travels[0]), SIZE_PX - reach - max(0, travels[0])),
        rng.uniform(reach - min(0, travels[1]), SIZE_PX - reach - max(0, travels[1])),
    )
    return Clip(scene, start, RADIUS_PX + rng.uniform(-RADIUS_JITTER_PX, RADIUS_JITTER_PX))


def centres(clips: Sequence[Clip], frames: torch.Tensor) -> torch.Tensor:
    """Centre (x, y) of the object of each clip at the frame times `frames` [T], in pixels, not wrapped: [B, T, 2]."""
    starts = torch.tensor([clip.start_px for clip in clips])
    steps = torch.tensor([DIRECTIONS[clip.scene.direction] for clip in clips])
    return starts[:, None] + steps[:, None] * SPEED_PX * frames.float()[:, None]


def _signed_distance(shape: str, dx: torch.Tensor, dy: torch.Tensor, radius: float) -> torch.Tensor:
    """Distance to the outline in pixels, negative inside."""
    if shape == "circle":
        return (dx * dx + dy * dy).sqrt() - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - radius * 0.86
    slopes = dx.abs() * (math.sqrt(3) / 2) - dy * 0.5 - radius * 0.58
    return torch.maximum(slopes, dy - radius * 0.86)


def _coverage(clip: Clip, frames: torch.Tensor, size_px: int) -> torch.Tensor:
    """How much of each pixel the shape covers, [T, size, size] in 0..1; one pixel of antialiasing."""
    axis = torch.arange(size_px) + 0.5
    # the shorter way round, as the picture wraps
    offsets = (axis - centres([clip], frames)[0].T[..., None] + size_px / 2) % size_px - size_px / 2
    dx, dy = offsets[0][:, None, :], offsets[1][:, :, None]
    return (0.5 - _signed_distance(clip.scene.shape, dx, dy, clip.radius_px)).clamp(0, 1)


def shape_areas() -> torch.Tensor:
    """Area in pixels of each of `SHAPES` at the usual radius, [3] in fp64."""
    clips = [Clip(Scene("red", shape, "right", "blue"), (SIZE_PX / 2, SIZE_PX / 2), RADIUS_PX) for shape in SHAPES]
    return render(clips, torch.zeros(1))[1].double().sum((1, 2, 3, 4))


def palette() -> torch.Tensor:
    """The colours in the order of `COLORS`, [6, 3] in -1..1."""
    return torch.tensor(list(COLORS.values())).float() / 127.5 - 1


def render(clips: Sequence[Clip], frames: torch.Tensor, size_px: int = SIZE_PX) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw B clips at the T frame times `frames`.

    Returns the video [B, 3, T, size, size] in -1..1 and the mask of the object [B, 1, T, size, size] in 0..1. A larger picture
    shows the same shape with more background around it.
    """
    colors = dict(zip(COLORS, palette(), strict=True))
    mask = torch.stack([_coverage(clip, frames.float(), size_px) for clip in clips])[:, None]
    front = torch.stack([colors[clip.scene.color] for clip in clips]).view(-1, 3, 1, 1, 1)
    back = torch.stack([colors[clip.scene.background] for clip in clips]).view(-1, 3, 1, 1, 1)
    return back * (1 - mask) + front * mask, mask
