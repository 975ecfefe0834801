"""Tiny pipelines in place of those of the hub, so that documented code runs word for word: nothing is downloaded, no GPU is needed.

A stand-in is a pipeline of the same class. Its call takes what the class takes; sizes are small and steps few whatever was asked for, but
large and many enough that a sparse backend with its defaults drops blocks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from tiny_pipelines import TinyPipeline, flux, wan, wan_two_transformers
from tiny_pipelines.wan import transformer

MOST_STEPS = 2
# 13 x 16 x 20 and 68 x 64 tokens: more than `min_tokens`
WAN_SIZE = {"height": 256, "width": 320, "num_frames": 49}
FLUX_SIZE = {"height": 136, "width": 128}

PIPELINES: dict[str, tuple[Callable[[], TinyPipeline], dict[str, int]]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (wan, WAN_SIZE),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": (wan_two_transformers, WAN_SIZE),
    "black-forest-labs/FLUX.1-dev": (flux, FLUX_SIZE),
}


def stand_in(model: str) -> Any:
    """The stand-in of a hub id."""
    build, size = PIPELINES[model]
    tiny = build()
    plain = type(tiny.pipe)

    class StandIn(plain):
        @functools.wraps(plain.__call__)
        def __call__(self, *args: Any, **asked: Any) -> Any:
            bound = inspect.signature(plain.__call__).bind(self, *args, **asked)
            wanted = {name: value for name, value in bound.arguments.items() if name != "self"}
            steps = min(wanted.get("num_inference_steps", MOST_STEPS), MOST_STEPS)
            if "prompt" not in tiny.arguments:
                # a tiny pipeline without a text encoder is given embeddings
                wanted.pop("prompt", None)
            return plain.__call__(self, **{**tiny.arguments, **wanted, **size, "num_inference_steps": steps})

        def to(self, *args: Any, **kwargs: Any) -> Any:
            return self

    # decoding takes longer than everything else, and no code of ours sees it
    tiny.pipe.vae.decode = _decoded
    StandIn.__name__ = StandIn.__qualname__ = plain.__name__
    tiny.pipe.__class__ = StandIn
    return tiny.pipe


def _decoded(latents: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor]:
    """A pixel for each latent: its first channels are the colours."""
    return (latents[:, :3].tanh(),)


@pytest.fixture
def hub_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """`from_pretrained` gives stand-ins, and everything stays on the CPU."""

    def pipeline(cls: type, model: str, **kwargs: Any) -> Any:
        made = stand_in(model)
        assert isinstance(made, cls), (model, cls)
        return made

    def denoiser(cls: type, model: str, **kwargs: Any) -> Any:
        assert model in PIPELINES, model
        assert kwargs.get("subfolder") == "transformer"
        return transformer().requires_grad_(False)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(pipeline))
    monkeypatch.setattr(diffusers.WanTransformer3DModel, "from_pretrained", classmethod(denoiser))
