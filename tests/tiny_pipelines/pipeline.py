"""A pipeline together with the arguments of its call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

HEADS, HEAD_SIZE, LAYERS = 2, 32, 2


@dataclass
class TinyPipeline:
    """Attributes:
    pipe: a diffusers pipeline.
    arguments: what its call needs besides the number of steps.
    """

    pipe: Any
    arguments: dict[str, Any]

    def __post_init__(self) -> None:
        self.pipe.set_progress_bar_config(disable=True)
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)

    def run(self, num_steps: int = 3, **overrides: Any) -> Tensor:
        """Latents of one call: the same seed, so the same latents, every time."""
        arguments = {**self.arguments, "generator": torch.Generator().manual_seed(0), "output_type": "latent", **overrides}
        latents: Tensor = self.pipe(num_inference_steps=num_steps, return_dict=False, **arguments)[0]
        return latents


def enlarge_weights(module: nn.Module) -> None:
    """Weights at which every layer's output is as large as its input, for models that begin with small or zero ones."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5, generator=generator)


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Normal noise that does not depend on what ran before."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(rows: int, columns: int, seed: int = 5) -> PIL.Image.Image:
    """A picture of noise."""
    return PIL.Image.fromarray((noise(rows, columns, 3, seed=seed).sigmoid() * 255).byte().numpy(), "RGB")
