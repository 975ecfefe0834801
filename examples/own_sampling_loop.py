"""A sampling loop of your own around a bare transformer: tell the step, and name the branches of guidance where there are several.

Without `ditattn.step` a bare transformer counts changes of the timestep, but cannot know how many steps there will be.
"""

import argparse

import torch
from diffusers import WanTransformer3DModel

import ditattn

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--latents", type=int, nargs=3, default=[21, 60, 104], metavar=("FRAMES", "ROWS", "COLUMNS"))
options = parser.parse_args()

transformer = WanTransformer3DModel.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", subfolder="transformer")
# in your program these come from a text encoder
text, no_text = torch.randn(2, 1, 512, transformer.config.text_dim)

latents = torch.randn(1, transformer.config.in_channels, *options.latents)
noise_levels = torch.linspace(1, 0, options.steps + 1)

with ditattn.install(transformer, "permuted_sparse_attn", sparsity=0.75, skip_first_steps="20%") as handle, torch.no_grad():
    for i in range(options.steps):
        timestep = noise_levels[i : i + 1] * 1000
        with ditattn.step(i, options.steps):
            with transformer.cache_context("cond"):
                wanted = transformer(latents, timestep, text, return_dict=False)[0]
            with transformer.cache_context("uncond"):
                plain = transformer(latents, timestep, no_text, return_dict=False)[0]
        latents = latents + (noise_levels[i + 1] - noise_levels[i]) * (plain + 5.0 * (wanted - plain))

print(handle.report().summary())
