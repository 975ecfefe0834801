"""How concentrated is self-attention? Softmax mass in the best quarter of the key blocks, per layer.

    python -m demo_model.attention_mass --model DIR [--clips 4]

Blocks hold 128 tokens in raster order; for every head and every block of queries the best blocks are those with the most mass.
Noisy versions of drawn held-out clips (17 frames, 64x64) go through the trained model, the same model before training, and one
whose weights are random and whose heads are not seeded. Prints one JSON line per model.
"""

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demo_model import forward, world
from demo_model.autoencoder import LatentMap
from demo_model.build import build_transformer
from demo_model.sample import load

BLOCK_TOKENS = 128
KEPT_SHARE = 0.25
SIGMAS = (0.95, 0.8, 0.5)


def block_mass(q: Tensor, k: Tensor, block: int = BLOCK_TOKENS) -> Tensor:
    """Softmax mass per query block and key block, [B, H, M, N], rows summing to 1; q, k [B, H, S, D] with S a multiple of `block`."""
    rows = []
    for part in torch.split(q.float(), block, 2):
        weights = (part @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        rows.append(weights.view(*weights.shape[:3], -1, block).sum(-1).mean(2))
    return torch.stack(rows, 2)


def best_share(mass: Tensor, kept: float = KEPT_SHARE) -> float:
    """Mean share (0..1) of the mass [B, H, M, N] that lies in the best `kept` of the N blocks, rounded down."""
    return float(mass.topk(max(1, int(kept * mass.shape[-1])), -1).values.sum(-1).mean())


@torch.no_grad()
def measure(transformer: Any, pipe: Any, num_clips: int, frames: int = world.CLIP_FRAMES) -> list[float]:
    """Share of the mass in the best blocks per layer, over clips and noise levels."""
    latent_map, generator, rng = LatentMap(pipe.vae), torch.Generator().manual_seed(0), random.Random(0)
    shares: list[float] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shares.append(best_share(block_mass(q, k)))
        return forward.plain_attention(q, k, v)

    for scene in world.held_out_scenes()[:num_clips]:
        clean = latent_map.encode(world.render([world.place(scene, rng)], torch.arange(frames))[0])
        tokens = pipe.tokenizer([world.caption(scene)], return_tensors="pt")
        for sigma in SIGMAS:
            x = (1 - sigma) * clean + sigma * torch.randn(clean.shape, generator=generator)
            text = (tokens.input_ids, tokens.attention_mask, 20)
            forward.velocity(transformer, pipe.text_encoder, x, torch.tensor([sigma]), *text, torch.arange(frames), attend)
    return torch.tensor(shares).view(-1, len(transformer.blocks)).mean(0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = load(args.model, torch.float32)
    nets = {"trained": pipe.transformer}
    for name, seeded in (("seeded, untrained", True), ("random", False)):
        torch.manual_seed(0)
        nets[name] = build_transformer(seeded=seeded)
    for name, net in nets.items():
        shares = [round(share, 3) for share in measure(net, pipe, args.clips)]
        print(json.dumps({"weights": name, "kept_share": KEPT_SHARE, "mass_by_layer": shares}), flush=True)


if __name__ == "__main__":
    main()
