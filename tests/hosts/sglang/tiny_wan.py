"""sglang's own Wan transformer, tiny and with random weights, in a denoising stage of sglang's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from sglang.multimodal_gen.configs.models.dits.wanvideo import WanVideoArchConfig, WanVideoConfig
from sglang.multimodal_gen.runtime.disaggregation.roles import RoleType
from sglang.multimodal_gen.runtime.layers import layernorm
from sglang.multimodal_gen.runtime.layers.custom_op import CustomOp
from sglang.multimodal_gen.runtime.models.dits.wanvideo import WanTransformer3DModel
from sglang.multimodal_gen.runtime.pipelines_core.stages.base import PipelineStage
from torch import Tensor

from hosts.sglang.server import HEAD_SIZE, LATENTS, STEPS, forward_of, request

LAYERS, HEADS, TEXT = 3, 2, 32
CALLS = STEPS * 2 * LAYERS


@contextlib.contextmanager
def reference_norms() -> Iterator[None]:
    """sglang's norms by their own reference, uncompiled: on a CPU they call operators of a build of sgl_kernel that is not published."""
    with (
        patch.object(CustomOp, "dispatch_forward", lambda op: op.forward_native),
        patch.object(layernorm, "fuse_scale_shift_kernel", lambda x, scale, shift: x * (1 + scale) + shift),
        torch.compiler.set_stance("force_eager"),
        torch.no_grad(),
    ):
        yield


def tiny_wan() -> Any:
    """Random weights, always the same."""
    arch = WanVideoArchConfig(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_SIZE,
        in_channels=LATENTS[1],
        out_channels=LATENTS[1],
        text_dim=TEXT,
        freq_dim=32,
        ffn_dim=128,
        num_layers=LAYERS,
    )
    model = WanTransformer3DModel(WanVideoConfig(arch_config=arch), hf_config={}).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        # norms stay near one; keys and queries are large enough for rows that look at few blocks
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.1 * noise if "norm" in name and name.endswith("weight") else noise * (parameter.shape[-1] ** -0.5))
    return model


class TinyDenoising(PipelineStage):
    """The loop of a denoising stage, two branches in every step."""

    @property
    def role_affinity(self) -> RoleType:
        return RoleType.DENOISER

    def forward(self, batch: Any, server_args: Any) -> Any:
        for step, timestep in enumerate(batch.timesteps):
            predictions = []
            for text in batch.texts:
                with forward_of(step, batch, server_args):
                    predictions.append(batch.model(batch.latents, [text], timestep.reshape(1)))
            batch.latents = batch.latents + 0.1 * (2 * predictions[0] - predictions[1])
        return batch


def _all(latents: Tensor) -> Tensor:
    return latents


def denoised(server_args: Any, shape: tuple[int, ...] = LATENTS, share: Callable[[Tensor], Tensor] = _all, **kwargs: Any) -> Tensor:
    """Latents after all steps of one request, of which this rank makes its `share`."""
    torch.manual_seed(0)
    model = tiny_wan()
    texts = list(torch.randn(2, 1, 7, TEXT))
    batch = SimpleNamespace(**vars(request(shape)), model=model, texts=texts, latents=share(torch.randn(shape)))
    vars(batch).update(kwargs)
    latents: Tensor = TinyDenoising()(batch, server_args).latents
    return latents
