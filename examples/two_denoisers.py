"""Wan 2.2 has a denoiser for the noisy steps and another one for the rest: keep the first one dense, run the second one sparse.

The two share one count of the steps. The keys belong to the backend that `install` names. Here the dense steps are those of the first
denoiser, so the second one needs none of its own.
"""

import torch
from diffusers import WanPipeline

import ditattn

pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.2-T2V-A14B-Diffusers", torch_dtype=torch.bfloat16).to("cuda")

backends = {"transformer": "torch_sdpa"}
with ditattn.install(pipe, "permuted_sparse_attn", components=backends, sparsity=0.75, skip_first_steps=0) as handle:
    video = pipe(prompt="waves roll onto a beach", num_inference_steps=40).frames[0]

report = handle.report()
for name, component in report.components.items():
    print(name, component.sentence())
