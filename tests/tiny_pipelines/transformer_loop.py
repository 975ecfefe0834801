"""A sampling loop around one transformer, for families whose pipelines want text encoders of billions of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from tiny_pipelines.pipeline import TinyPipeline

__all__ = ["looped"]

# (latents, prompt embeddings, timestep [B]) -> the forward's arguments
Arguments = Callable[[Tensor, Tensor, Tensor], dict[str, Any]]


class TransformerLoop(DiffusionPipeline):
    """As much of a pipeline as its sampling loop: one forward per step, no guidance."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        arguments_of: Arguments,
        shape: tuple[int, ...],
        prompt_embeds: Tensor,
        num_inference_steps: int,
        generator: torch.Generator,
        output_type: str,
        return_dict: bool,
        image_last: bool = False,
    ) -> tuple[Tensor]:
        latents = torch.randn(*shape, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.scheduler.timesteps:
            named = arguments_of(latents, prompt_embeds, timestep.expand(len(latents)))
            (predicted, *_) = self.transformer(**named, return_dict=False)
            predicted = torch.stack(predicted) if isinstance(predicted, list) else predicted
            # reference images stand behind the image, or before it
            predicted = predicted[:, -latents.shape[1] :] if image_last else predicted[:, : latents.shape[1]]
            latents = self.scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        self.maybe_free_model_hooks()
        return (latents,)


def looped(
    transformer: nn.Module, arguments_of: Arguments, shape: tuple[int, ...], prompt_embeds: Tensor, image_last: bool = False
) -> TinyPipeline:
    """A transformer in its loop.

    Args:
        arguments_of: also gets the changed embeddings of tests that move the text.
        shape: of the latents.
        image_last: given images stand before the image in what the model predicts.
    """
    arguments = {"arguments_of": arguments_of, "shape": shape, "prompt_embeds": prompt_embeds, "image_last": image_last}
    return TinyPipeline(TransformerLoop(transformer, FlowMatchEulerDiscreteScheduler()), arguments)
