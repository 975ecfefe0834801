"""What each of several processes does: its share of the tokens through vllm_omni's own Ulysses exchange around a layer of ditattn."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

GRID, HEADS, HEAD_SIZE = (8, 16, 16), 4, 64


def tensors() -> list[Tensor]:
    """The whole q, k, v."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2048, HEADS, HEAD_SIZE, generator=generator) for _ in range(3)]


def attend(backend: str) -> tuple[Tensor, int]:
    """This rank's tokens of the result, and how many calls ran sparse."""
    from omni import vllm_stand_in

    vllm_stand_in.install()
    from vllm_omni.diffusion import config, data
    from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata, VideoTokenLayout
    from vllm_omni.diffusion.attention.layer import Attention
    from vllm_omni.diffusion.attention.parallel.ulysses import UlyssesParallelAttention
    from vllm_omni.diffusion.forward_context import set_forward_context, set_forward_context_denoise_step_idx

    from ditattn.hosts.vllm_omni import register
    from ditattn.hosts.vllm_omni.environment import KEYS, SWITCH
    from ditattn.hosts.vllm_omni.run import run_of_process

    os.environ |= {SWITCH: backend, KEYS: "min_tokens=0"}
    register()
    count, rank = dist.get_world_size(), dist.get_rank()
    parallel: dict[str, Any] = {"ring_degree": 1, "allgather_degree": 1, "ulysses_degree": count, "sequence_parallel_size": count}
    asked = {"default": {"backend": "RAINFUSION_ATTN", "block_sparse": {"sparsity": 0.75}}}
    built = SimpleNamespace(
        diffusion_attention_config=data.build_attention_config(asked), parallel_config=SimpleNamespace(**parallel), model_class_name=None
    )
    with config.set_current_diffusion_config(built):
        layer = Attention(HEADS, HEAD_SIZE, False, HEAD_SIZE**-0.5, prefix="blocks.0.attn1", qkv_layout="BSND")
    group = SimpleNamespace(ulysses_group=dist.group.WORLD, ulysses_world_size=count, ulysses_rank=rank, ring_world_size=1)
    strategy = UlyssesParallelAttention(sp_group=group, scatter_idx=2, gather_idx=1, use_sync=False)
    # as its own factory chooses it where the configuration of a server says so
    layer._get_active_parallel_strategy = lambda: strategy
    layout = VideoTokenLayout(prefix_len=0, latent_grid=GRID, used_len=2048)
    ours = [x.chunk(count, dim=1)[rank].contiguous() for x in tensors()]
    with set_forward_context():
        set_forward_context_denoise_step_idx(1)
        out = layer(*ours, AttentionMetadata(video_layout=layout))
    return out, sum(cell.sparse for cell in run_of_process().log_of(layer.attention._layer).cells.values())
