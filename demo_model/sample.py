"""Draw clips with the stock `WanPipeline` and lay them out as a contact sheet: one row per prompt, one column per frame.

python -m demo_model.sample --model DIR --out sheet.png [--prompts 16] [--frames 17] [--steps 24]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from PIL import Image, ImageDraw

from demo_model import world

STEPS = 24
GUIDANCE = 3.0
TEXT_TOKENS = 32
LABEL_PX = 14


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> WanPipeline:
    """The pipeline in `folder` with its transformer in `dtype`."""
    pipe = WanPipeline.from_pretrained(folder, local_files_only=True)
    pipe.transformer.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_clips(
    pipe: WanPipeline,
    captions: Sequence[str],
    seed: int,
    frames: int = 17,
    size_px: int = 64,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> np.ndarray:
    """Clips for the captions, [B, T, size, size, 3] in 0..1; caption i starts from the noise of seed + i."""
    # this autoencoder keeps every frame, and the pipeline then adds one to what is asked
    videos = [
        pipe(
            caption,
            height=size_px,
            width=size_px,
            num_frames=frames - 1,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed + i),
            max_sequence_length=TEXT_TOKENS,
            output_type="np",
        ).frames[0]
        for i, caption in enumerate(captions)
    ]
    return np.stack(videos)


def contact_sheet(videos: np.ndarray, captions: Sequence[str], columns: int = 6, zoom: int = 1) -> Image.Image:
    """Lay out videos [B, T, Y, X, 3] in 0..1: each caption above `columns` evenly spaced frames."""
    num, frames, size = videos.shape[:3]
    picked = np.linspace(0, frames - 1, min(columns, frames)).round().astype(int)
    cell = size * zoom + 2
    sheet = Image.new("RGB", (cell * len(picked), (cell + LABEL_PX) * num), "white")
    draw = ImageDraw.Draw(sheet)
    for row in range(num):
        top = row * (cell + LABEL_PX)
        draw.text((1, top), captions[row], fill="black")
        for column, frame in enumerate(picked):
            pixels = (videos[row, frame] * 255).round().astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1)
            sheet.paste(Image.fromarray(pixels), (column * cell, top + LABEL_PX))
    return sheet


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two sheets side by side."""
    both = Image.new("RGB", (left.width + right.width + 8, max(left.height, right.height)), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + 8, 0))
    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=16, help="how many held-out prompts, in two columns")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    captions = [world.caption(scene) for scene in world.held_out_scenes()[: args.prompts]]
    videos = draw_clips(load(args.model), captions, args.seed, args.frames, steps=args.steps, guidance=args.guidance)
    half = (len(captions) + 1) // 2
    sheets = [contact_sheet(videos[part], captions[part]) for part in (slice(half), slice(half, None)) if captions[part]]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    (beside(*sheets) if len(sheets) == 2 else sheets[0]).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
