"""What one of several processes does, over gloo: sglang's layers under its Ulysses, and its whole models."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hosts.sglang import vision_operators

vision_operators.declare()

from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig  # noqa: E402
from sglang.multimodal_gen.runtime.distributed import parallel_state  # noqa: E402
from sglang.multimodal_gen.runtime.layers.attention.layer import UlyssesAttention, USPAttention  # noqa: E402
from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks, load_plugins  # noqa: E402

from ditattn.hosts.sglang.serving import serving  # noqa: E402
from ditattn.runtime.report import ComponentReport  # noqa: E402
from hosts.sglang import server, tiny_models, tiny_wan  # noqa: E402

KINDS = {"USPAttention": USPAttention, "UlyssesAttention": UlyssesAttention}
Answer = tuple[Tensor, ComponentReport | None]


def _meet() -> tuple[int, int]:
    """sglang's groups of all ranks, and its plug-ins, as its worker has them; rank and number of ranks."""
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if not parallel_state.model_parallel_is_initialized():
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
        parallel_state.maybe_init_distributed_environment_and_model_parallel(tp_size=1, sp_size=count, ulysses_degree=count)
        load_plugins()
        apply_plugin_hooks()
    assert parallel_state.get_ulysses_parallel_world_size() == count
    return rank, count


def layer(kind: str, name: str, config: dict[str, Any], qkv: list[Tensor], latents: tuple[int, ...] = server.LATENTS) -> Answer:
    """One call of a layer: this rank's tokens of the result, and its report."""
    rank, count = _meet()
    server_args, batch = server.serve(name, **config), server.request(latents)
    made = KINDS[kind](num_heads=qkv[0].shape[2], head_size=server.HEAD_SIZE, causal=False, prefix="blocks.0.attn1")
    with torch.no_grad(), server.forward_of(1, batch, server_args):
        out = made(*(x.chunk(count, dim=1)[rank].contiguous() for x in qkv))
    return out[0] if isinstance(out, tuple) else out, serving().end_of_stage().components["transformer"]


def wan(name: str, config: dict[str, Any], latents: tuple[int, ...], share: str) -> Answer:
    """A whole request: latents that every rank has in the end, and the report.

    `share` is "tokens" where the model shares them between the ranks, "frames" where sglang's pipeline shares the latents before.
    """
    _meet()
    pipeline = PipelineConfig()
    batch = SimpleNamespace(enable_sequence_shard=share == "tokens")
    with tiny_wan.reference_norms():
        out = tiny_wan.denoised(
            server.serve(name, **config),
            latents,
            lambda whole: pipeline.shard_latents_for_sp(batch, whole)[0].contiguous(),
            enable_sequence_shard=batch.enable_sequence_shard,
        )
        if share == "frames":
            out = pipeline.gather_latents_for_sp(out)
    report = serving().last_report
    return out, None if report is None else report.components["transformer"]


def model(name: str, config: dict[str, Any]) -> Answer:
    """One forward of a model with text: this rank's part of the result, and its report."""
    rank, count = _meet()
    tiny = tiny_models.MODELS[name]
    latents, texts = tiny_models.latents_and_texts(tiny)
    with tiny_wan.reference_norms():
        part = tiny_models.parts(name, latents, count)[rank].contiguous()
        out = tiny_models.one_forward(tiny, "rain_fusion_attn", config, part, texts[0])
    return out, serving().end_of_stage().components["transformer"]
