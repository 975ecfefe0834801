"""Text to video with Wan 2.1, sparse after the first fifth of the steps, with an error instead of a run that saves nothing.

`preset="quality"` changes less of the picture, `preset="fast"` is for drafts.
"""

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video

import ditattn

pipe = DiffusionPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch_dtype=torch.bfloat16).to("cuda")

with ditattn.install(pipe, "permuted_sparse_attn", preset="balanced", strict=True) as handle:
    video = pipe(prompt="a cat walks on the grass", num_frames=81, num_inference_steps=50).frames[0]

export_to_video(video, "cat.mp4", fps=16)
print(handle.report().summary())
