"""Draw clips for held-out prompts with the stock `WanPipeline` and judge them from their pixels.

    python -m demo_model.evaluate --model DIR [--prompts 20] [--out results.json] [--sheet sheet.png]

Prompt i starts from the noise of --seed + i. Prints the verdict on each clip and the share that is right, per question, as JSON.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from demo_model import world
from demo_model.judge import judge, shares_right
from demo_model.sample import GUIDANCE, STEPS, beside, contact_sheet, draw_clips, load


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder that WanPipeline.from_pretrained takes")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--shift", type=float, help="timestep shift instead of the scheduler's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--sheet", type=Path, help="contact sheet to write")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    pipe = load(args.model)
    if args.shift:
        pipe.scheduler = type(pipe.scheduler)(shift=args.shift)
    scenes = world.held_out_scenes()[: args.prompts]
    captions = [world.caption(scene) for scene in scenes]
    videos = draw_clips(pipe, captions, args.seed, args.frames, args.size, args.steps, args.guidance)
    verdicts = [judge(video) for video in videos]
    rows = [{"caption": caption, **asdict(verdict)} for caption, verdict in zip(captions, verdicts, strict=True)]
    for row in rows:
        print(json.dumps(row))
    settings = {name: getattr(args, name) for name in ("prompts", "frames", "size", "steps", "guidance", "shift", "seed")}
    summary = {"settings": settings, "right": shares_right(verdicts, scenes)}
    print(json.dumps(summary))
    if args.out:
        args.out.write_text(json.dumps(summary | {"clips": rows}, indent=1) + "\n")
    if args.sheet:
        half = (len(captions) + 1) // 2
        sheets = [contact_sheet(videos[part], captions[part]) for part in (slice(half), slice(half, None))]
        beside(*sheets).save(args.sheet, optimize=True)


if __name__ == "__main__":
    main()
