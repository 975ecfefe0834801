"""sglang's arguments and steps, as its server would have them for a tiny Wan."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from sglang.multimodal_gen.runtime import server_args as server_args_module
from sglang.multimodal_gen.runtime.distributed import parallel_state
from sglang.multimodal_gen.runtime.layers.attention import selector
from sglang.multimodal_gen.runtime.layers.attention.selector import get_attn_backend
from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context
from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage
from sglang.multimodal_gen.runtime.platforms import AttentionBackendEnum

from ditattn.hosts.sglang.serving import serving

HEAD_SIZE = 64
# 4 x 16 x 24 tokens, 12 blocks of 128: block_sparse_attn drops none of fewer than 10
LATENTS = (1, 4, 4, 32, 48)
TOKENS = 4 * 16 * 24
STEPS = 4


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """sglang's layers ask how many ranks there are."""
    if not parallel_state.model_parallel_is_initialized():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with tempfile.TemporaryDirectory() as folder:
            parallel_state.maybe_init_distributed_environment_and_model_parallel(
                tp_size=1, sp_size=1, distributed_init_method=f"file://{folder}/store"
            )
    yield


def serve(attention_backend: str | None = None, prefix: str = "Wan", **config: Any) -> SimpleNamespace:
    """`--attention-backend` and `--attention-backend-config` of this process."""
    forget()
    dit_config = SimpleNamespace(prefix=prefix, patch_size=(1, 2, 2), hidden_size=128, num_attention_heads=2)
    server_args = SimpleNamespace(
        attention_backend=attention_backend,
        attention_backend_config=config,
        comfyui_mode=False,
        disable_autocast=False,
        enable_breakable_cuda_graph=False,
        enable_cfg_parallel=False,
        enable_layerwise_nvtx_marker=False,
        enable_torch_compile=False,
        kv_gather_degree=1,
        sp_split_auto=False,
        pipeline_config=SimpleNamespace(dit_config=dit_config),
    )
    server_args_module.set_global_server_args(server_args)
    return server_args


def forget() -> None:
    """Another server begins."""
    serving().end_of_stage()
    serving.cache_clear()
    selector._cached_get_attn_backend.cache_clear()
    server_args_module.set_global_server_args(None)


def request(latents: tuple[int, ...] = LATENTS, steps: int = STEPS) -> SimpleNamespace:
    """What sglang knows of a request while it denoises."""
    return SimpleNamespace(
        raw_latent_shape=latents,
        timesteps=torch.linspace(1000, 0, steps + 1)[:-1],
        num_inference_steps=steps,
        enable_sequence_shard=False,
        enable_teacache=False,
        enable_spectrum=False,
        is_warmup=False,
        metrics=None,
        perf_dump_path=None,
        extra={},
    )


def metadata_of(step: int, batch: Any, server_args: Any) -> Any:
    """What sglang's denoising stage builds for a step."""
    stage = object.__new__(DenoisingStage)
    stage.attn_backend = get_attn_backend(
        HEAD_SIZE, torch.float16, selected_attention_backend=AttentionBackendEnum[server_args.attention_backend.upper()]
    )
    return stage._build_attn_metadata(step, batch, server_args)


@contextlib.contextmanager
def forward_of(step: int, batch: Any, server_args: Any) -> Iterator[None]:
    """One forward of the denoiser in a step, as `_predict_noise_with_cfg` begins it."""
    with set_forward_context(current_timestep=step, attn_metadata=metadata_of(step, batch, server_args), forward_batch=batch):
        yield
