"""The loop of a pipeline without encoders and decoders, for denoisers whose own pipelines need models that are large even when tiny."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tiny_pipelines.pipeline import TinyPipeline

Predict = Callable[[Any, Tensor, Tensor, dict[str, Any]], Tensor]
# (latents, prompt embeddings, timestep [B]) -> the forward's arguments
Arguments = Callable[[Tensor, Tensor, Tensor], dict[str, Any]]


def predict(transformer: Any, latents: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
    """What most denoisers are called with."""
    output: Tensor = transformer(hidden_states=latents, timestep=timestep, **inputs, return_dict=False)[0]
    return output


class DenoisingLoop(DiffusionPipeline):
    """Calls the denoiser once or, with `negative_prompt_embeds`, twice a step.

    Attributes:
        shape: of the latents.
        text: the denoiser's name for the prompt's embedding.
        predict: (denoiser, latents, timestep `[B]`, its other inputs) -> prediction in the latents' shape.
    """

    shape: tuple[int, ...]
    text: str
    predict: Predict

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        num_inference_steps: int,
        generator: torch.Generator,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "latent",
        return_dict: bool = False,
        **inputs: Any,
    ) -> tuple[Tensor]:
        latents = torch.randn(self.shape, generator=generator, dtype=self.transformer.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        prompts = [prompt_embeds] if negative_prompt_embeds is None else [prompt_embeds, negative_prompt_embeds]
        for t in self.scheduler.timesteps:
            timestep = t.expand(self.shape[0])
            first, *other = (self.predict(self.transformer, latents, timestep, {**inputs, self.text: prompt}) for prompt in prompts)
            noise = first if not other else other[0] + 2 * (first - other[0])
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        self.maybe_free_model_hooks()
        return (latents,)


def without_zeros(transformer: Any) -> Any:
    """The same denoiser with noise in weights that start at zero: a gate of zero would hide what attention makes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05, generator=generator)
    return transformer


def with_louder_values(transformer: Any) -> Any:
    """The same denoiser with larger values, where what attention makes would drown in the residual."""
    with torch.no_grad():
        for module in transformer.modules():
            values = getattr(module, "to_v", getattr(module, "to_value", None))
            if values is not None:
                values.weight.mul_(4)
    return transformer


def looped(
    transformer: Any, shape: tuple[int, ...], inputs: dict[str, Any], *, text: str = "encoder_hidden_states", predict: Predict = predict
) -> TinyPipeline:
    """`inputs` of every call: `prompt_embeds`, perhaps `negative_prompt_embeds`, and the denoiser's other inputs by its own names."""
    pipe = DenoisingLoop(transformer, FlowMatchEulerDiscreteScheduler())
    pipe.shape, pipe.text, pipe.predict = shape, text, predict
    return TinyPipeline(pipe, inputs)


def looped_by(
    transformer: Any, arguments_of: Arguments, shape: tuple[int, ...], prompt_embeds: Tensor, image_last: bool = False
) -> TinyPipeline:
    """The same for a denoiser whose arguments are made anew of the latents and the text in every step.

    Args:
        arguments_of: also gets the changed embeddings of tests that move the text.
        shape: of the latents.
        image_last: given images stand before the image in what the denoiser predicts.
    """

    def predict_image(transformer: Any, latents: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
        (predicted, *_) = transformer(**arguments_of(latents, inputs["text"], timestep), return_dict=False)
        predicted = torch.stack(predicted) if isinstance(predicted, list) else predicted
        # reference images stand behind the image, or before it
        return predicted[:, -latents.shape[1] :] if image_last else predicted[:, : latents.shape[1]]

    return looped(transformer, shape, {"prompt_embeds": prompt_embeds}, text="text", predict=predict_image)
