"""An image with Flux.1, once densely and once sparse from the same seed, to see what the setting changes.

Large images gain most: one of 1024 x 1024 pixels has 4096 tokens, one of 2048 x 2048 has four times as many.
"""

import torch
from diffusers import FluxPipeline

import ditattn

pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16).to("cuda")

for name, backend in {"dense": "torch_sdpa", "sparse": "permuted_sparse_attn"}.items():
    with ditattn.install(pipe, backend) as handle:
        seed = torch.Generator("cpu").manual_seed(0)
        image = pipe(prompt="a lighthouse at dusk", height=2048, width=2048, num_inference_steps=28, generator=seed).images[0]
    image.save(f"lighthouse_{name}.png")
    print(handle.report().summary())
