"""Split a pipeline's denoisers between the ranks of this program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from ditattn.errors import ConfigError, UnsupportedModel
from ditattn.hosts.diffusers.guidance_parallel import BRANCHES, share_branches
from ditattn.models import unwrapped

__all__ = ["PLANS", "enable_context_parallelism", "split_denoisers"]

_TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)
_POSITIONS = ContextParallelInput(split_dim=0, expected_dims=2)
_BLOCKS = {"transformer_blocks.0": {"hidden_states": _TOKENS, "encoder_hidden_states": _TOKENS}}
_RESULT = {"proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3)}

PLANS: dict[str, dict[str, Any]] = {
    "HunyuanVideoTransformer3DModel": {
        "rope": {place: replace(_POSITIONS, split_output=True) for place in (0, 1)},
        **_BLOCKS,
        **_RESULT,
    },
    "CogVideoXTransformer3DModel": {"": {"image_rotary_emb": [_POSITIONS, _POSITIONS]}, **_BLOCKS, **_RESULT},
}
"""By class, for transformers that diffusers 0.42.1 has no plan for. They are right with an installed backend alone: HunyuanVideo's mask is
not split with its tokens, and CogVideoX does not exchange any by itself."""


def _plan(module: Any) -> Any:
    """How the module's tokens are split: its own plan, or ours; None if there is none."""
    own = unwrapped(module)
    plan = getattr(own, "_cp_plan", None) or PLANS.get(type(own).__name__)
    if plan is not None and not getattr(own.config, "use_rotary_positional_embeddings", True):
        # CogVideoX of 2 B parameters has positions in its embedding
        return {name: part for name, part in plan.items() if name}
    return plan


def enable_context_parallelism(module: Any, cp_plan: Any = None, mesh: Any = None, **degrees: Any) -> None:
    """`module.enable_parallelism` of diffusers with a `ContextParallelConfig` of these degrees.

    `cp_plan` is the model's own unless given, or one of `PLANS` where it has none; `mesh` has the dimensions ring and ulysses and is made
    of all ranks unless given.

    It divides by the number of accelerators to find this rank's device, also on a machine that has none (seen in 0.42.1): there torch is
    made to count the CPU as one while it looks.
    """
    from diffusers import ContextParallelConfig

    plan = _plan(module) if cp_plan is None else cp_plan
    config = ContextParallelConfig(**degrees, mesh=_mesh(module, 1, degrees)["ring", "ulysses"] if mesh is None else mesh)
    count = torch.accelerator.device_count
    if not count():
        torch.accelerator.device_count = lambda: 1
    try:
        module.enable_parallelism(config=config, cp_plan=plan)
    finally:
        torch.accelerator.device_count = count


def _mesh(module: nn.Module, branches: int, degrees: Mapping[str, Any]) -> Any:
    """All ranks. diffusers would take the machine's accelerator also for a module on the CPU."""
    shape = (branches, degrees.get("ring_degree", 1), degrees.get("ulysses_degree", 1))
    return init_device_mesh(next(module.parameters()).device.type, shape, mesh_dim_names=("cfg", "ring", "ulysses"))


def split_denoisers(pipe: Any, *, cfg_parallel: bool = False, **degrees: Any) -> None:
    """Split every denoiser of a pipeline between the ranks.

    Args:
        pipe: a pipeline.
        cfg_parallel: each half of the ranks makes one branch of classifier-free guidance.
        degrees: of a `ContextParallelConfig`, for the ranks of a branch.

    Raises:
        UnsupportedModel: diffusers has no plan to split one of them.
        ConfigError: degrees that diffusers does not take together.
    """
    parts = {name: part for name, part in pipe.components.items() if name.startswith("transformer") and isinstance(part, nn.Module)}
    splits_tokens = degrees.get("ring_degree", 1) * degrees.get("ulysses_degree", 1) > 1
    for name, part in parts.items():
        if splits_tokens and _plan(part) is None:
            raise UnsupportedModel(f"{name}: there is no plan to split a {type(unwrapped(part)).__name__} between processes")
    for part in parts.values():
        mesh = _mesh(part, BRANCHES if cfg_parallel else 1, degrees)
        if splits_tokens:
            try:
                enable_context_parallelism(part, mesh=mesh["ring", "ulysses"], **degrees)
            except (ValueError, NotImplementedError) as error:
                raise ConfigError(f"diffusers cannot split the denoiser so: {error}") from error
        if cfg_parallel:
            share_branches(part, mesh["cfg"].get_group())
