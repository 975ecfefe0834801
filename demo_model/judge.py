"""Judge a clip from its pixels: is the object there, does it have the colour, shape and direction that the caption asked for?

Pixels are named after the nearest colour of the world. The background is the most common name of the clip; the object of a frame
is the largest connected component of any other pixels, where the picture wraps round its edges, as the world does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from demo_model import world

# an object covers this share of a frame; drawn ones cover 18 to 26 %
SMALLEST_SHARE, LARGEST_SHARE = 0.05, 0.42
# of the frames in which the object must be seen
PRESENT_SHARE = 0.8
# overlap (intersection over union) with the best-fitting shape below which the object has no shape
LEAST_OVERLAP = 0.7
# of the drawn displacement that counts as moving
LEAST_TRAVEL = 0.25


@dataclass(frozen=True)
class Verdict:
    """What the pixels show; a name is None where nothing could be told."""

    background: str
    present: bool
    color: str | None
    shape: str | None
    direction: str | None
    overlap: float
    travel_px: float
    stray_share: float

    def agrees(self, scene: world.Scene) -> dict[str, bool]:
        """Per question, whether the pixels show what the scene tells; nothing is right about an absent object."""
        return {
            "present": self.present,
            "color": self.present and self.color == scene.color,
            "background": self.background == scene.background,
            "direction": self.present and self.direction == scene.direction,
            "shape": self.present and self.shape == scene.shape,
        }


def nearest_colors(video: np.ndarray) -> np.ndarray:
    """Index of the nearest world colour for each pixel of video [T, Y, X, 3] in 0..1; returns [T, Y, X]."""
    palette = np.array(list(world.COLORS.values())) / 255
    nearest: np.ndarray = ((video[..., None, :] - palette) ** 2).sum(-1).argmin(-1)
    return nearest


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected component of each mask [T, Y, X], with wrapping edges."""
    labels = np.where(mask, np.arange(1, mask[0].size + 1, dtype=np.int32).reshape(mask.shape[1:]), 0)
    while True:
        neighbours = [np.roll(labels, shift, axis) for shift, axis in ((1, 1), (-1, 1), (1, 2), (-1, 2))]
        spread = np.where(mask, np.maximum.reduce([labels, *neighbours]), 0)
        if np.array_equal(spread, labels):
            break
        labels = spread
    sizes = [np.bincount(frame.ravel(), minlength=mask[0].size + 1) for frame in labels]
    best = np.array([0 if not size[1:].any() else 1 + size[1:].argmax() for size in sizes])
    largest: np.ndarray = mask & (labels == best[:, None, None])
    return largest


def _centres(objects: np.ndarray) -> np.ndarray:
    """Centres [T, 2] as (x, y) in pixels of masks [T, Y, X]: the angle of the mean on the circle, since edges wrap."""
    centres = []
    for axis, size in ((1, objects.shape[2]), (2, objects.shape[1])):
        weights = objects.sum(axis)
        turns = np.exp(2j * np.pi * (np.arange(size) + 0.5) / size)
        centres.append(np.angle(weights @ turns) / (2 * np.pi) * size)
    return np.stack(centres, 1)


def _overlaps(mask: np.ndarray, centre: np.ndarray) -> list[float]:
    """Best intersection over union of one mask [Y, X] with each shape of the world, of equal area and about the same centre."""
    size = mask.shape[0]
    radii = world.RADIUS_PX * np.sqrt(mask.sum() / world.shape_areas().numpy())
    overlaps = []
    for shape, radius in zip(world.SHAPES, radii, strict=True):
        scene = world.Scene("red", shape, "right", "blue")
        starts = [(centre[0] + dx, centre[1] + dy) for dx in (-2, 0, 2) for dy in (-4, -2, 0, 2, 4)]
        clips = [world.Clip(scene, start, float(radius)) for start in starts]
        drawn = world.render(clips, torch.zeros(1), size)[1][:, 0, 0].numpy() > 0.5
        overlaps.append(float(((drawn & mask).sum((1, 2)) / (drawn | mask).sum((1, 2))).max()))
    return overlaps


def _direction(centres: np.ndarray, frames: np.ndarray, size: int) -> tuple[str | None, float]:
    """The way the centres [T, 2] go between the frame numbers [T], and how far in pixels along it."""
    if len(frames) < 2:
        return None, 0.0
    steps = (np.diff(centres, axis=0) + size / 2) % size - size / 2
    moved = steps.sum(0)
    name, travel = max(((name, float(moved @ way)) for name, way in world.DIRECTIONS.items()), key=lambda item: item[1])
    drawn = world.SPEED_PX * (frames[-1] - frames[0])
    return (name if travel >= LEAST_TRAVEL * drawn else None), travel


def judge(video: np.ndarray, shape_frames: int = 3) -> Verdict:
    """Judge a square video [T, Y, X, 3] in 0..1; the shape is judged on `shape_frames` evenly spaced frames with an object."""
    colors = nearest_colors(video)
    names = list(world.COLORS)
    background = int(np.bincount(colors.ravel()).argmax())
    objects = largest_component(colors != background)
    # shares are of a picture of the default size: larger pictures hold more background, not larger objects
    shares = objects.sum((1, 2)) / world.SIZE_PX**2
    seen = np.flatnonzero((shares >= SMALLEST_SHARE) & (shares <= LARGEST_SHARE))
    stray = 1 - objects.sum() / max(1, (colors != background).sum())
    if len(seen) < PRESENT_SHARE * len(video):
        return Verdict(names[background], False, None, None, None, 0.0, 0.0, float(stray))
    color = names[int(np.bincount(colors[objects]).argmax())]
    centres = _centres(objects[seen])
    direction, travel = _direction(centres, seen, video.shape[1])
    picked = np.unique(np.linspace(0, len(seen) - 1, shape_frames).round().astype(int))
    overlaps = np.mean([_overlaps(objects[seen[i]], centres[i]) for i in picked], axis=0)
    shape = world.SHAPES[int(overlaps.argmax())] if overlaps.max() >= LEAST_OVERLAP else None
    return Verdict(names[background], True, color, shape, direction, float(overlaps.max()), travel, float(stray))


def shares_right(verdicts: Sequence[Verdict], scenes: Sequence[world.Scene]) -> dict[str, float]:
    """Per question, the share of the clips (0..1) that show what their scenes tell."""
    rows = [verdict.agrees(scene) for verdict, scene in zip(verdicts, scenes, strict=True)]
    return {question: sum(row[question] for row in rows) / len(rows) for question in rows[0]}
