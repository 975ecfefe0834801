"""A pipeline together with the arguments of its call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

HEADS, HEAD_SIZE, LAYERS = 2, 32, 2
WIDTH = HEADS * HEAD_SIZE
# by the names of most denoisers
ATTENTION: dict[str, Any] = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_SIZE}
SIZES: dict[str, Any] = {**ATTENTION, "in_channels": 4, "out_channels": 4}


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


def denoiser(transformer_class: Callable[..., Any], **settings: Any) -> Any:
    """A denoiser of a class of diffusers, always with the same weights."""
    torch.manual_seed(0)
    return transformer_class(**settings)


def enlarged_denoiser(transformer_class: Callable[..., Any], **settings: Any) -> Any:
    """The same for a class that begins with small or zero weights."""
    made = denoiser(transformer_class, **settings)
    enlarge_weights(made)
    return made


def parts(transformer: Any, vae: Any, scheduler: Any = None, encoders: int = 1) -> dict[str, Any]:
    """Components of a pipeline whose text encoders are left out, since its call gets embeddings."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    suffixes = ["", *(f"_{number}" for number in range(2, encoders + 1))]
    left_out = {f"{kind}{suffix}": None for kind in ("text_encoder", "tokenizer") for suffix in suffixes}
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler or FlowMatchEulerDiscreteScheduler(), **left_out}


def prompts(*shape: int) -> dict[str, Any]:
    """Embeddings of a prompt and of a negative one."""
    return {"prompt_embeds": noise(*shape), "negative_prompt_embeds": noise(*shape, seed=2)}


def prompt_masks(real: int, negative: int, of: int, name: str = "prompt_attention_mask") -> dict[str, Any]:
    """Which of `of` tokens of both are real."""
    return {name: first(real, of), f"negative_{name}": first(negative, of)}


def first(count: int, of: int) -> Tensor:
    """bool `[1, of]`: a text with padding at its end."""
    return torch.arange(of).lt(count).unsqueeze(0)


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
