"""The hooks around sglang's denoising stages: what a request is, what ran in it, and metadata where sglang cannot build them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ditattn.hosts.sglang.serving import logger, serving

__all__ = ["watch_requests"]

_STAGES = "sglang.multimodal_gen.runtime.pipelines_core.stages"
STAGE = f"{_STAGES}.base.PipelineStage.__call__"
METADATA = f"{_STAGES}.denoising.DenoisingStage._build_attn_metadata"


def watch_requests() -> None:
    """Log what ran at the end of every denoising stage: sglang runs each stage of a request by `PipelineStage.__call__`, which no stage
    replaces."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    for target, hook in ((STAGE, run_stage), (METADATA, build_metadata)):
        if not any(known is hook for _, known, _ in HookRegistry._hooks.get(target, ())):
            HookRegistry.register(target, hook, HookType.AROUND)
    HookRegistry.apply_hooks()


def run_stage(original: Callable[..., Any], stage: Any, batch: Any, server_args: Any) -> Any:
    """One stage of a request; what ran in a denoising stage is logged when it has ended."""
    from sglang.multimodal_gen.runtime.disaggregation.roles import RoleType

    if stage.role_affinity != RoleType.DENOISER:
        return original(stage, batch, server_args)
    with serving().serves(batch):
        result = original(stage, batch, server_args)
    report = serving().end_of_stage()
    if report is not None and not getattr(batch, "is_warmup", False):
        logger().info(report.summary())
    return result


def build_metadata(original: Callable[..., Any], stage: Any, i: int, batch: Any, server_args: Any, **kwargs: Any) -> Any:
    """The metadata of a step: sglang's own way to them asks every model's configuration for a `patch_size`, which some do not have."""
    is_ours = getattr(stage.attn_backend, "has_metadata_of_ditattn", False)
    if not is_ours or hasattr(server_args.pipeline_config.dit_config, "patch_size"):
        return original(stage, i, batch, server_args, **kwargs)
    return stage.attn_backend.get_builder_cls()().build(current_timestep=i, raw_latent_shape=batch.raw_latent_shape)
