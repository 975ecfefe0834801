"""Split a pipeline's denoisers between the ranks of this program."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from ditattn.errors import ConfigError, UnsupportedModel
from ditattn.hosts.diffusers.guidance_parallel import BRANCHES, share_branches
from ditattn.hosts.diffusers.install import denoisers
from ditattn.models import family_of, unwrapped
from ditattn.models.base import SplitAxis

__all__ = ["enable_context_parallelism", "split_denoisers"]


def _plan(module: Any) -> Any:
    """How the module's tokens are split: diffusers' own plan, or that of the family; None if there is none."""
    own = unwrapped(module)
    family, plan = family_of(own), getattr(own, "_cp_plan", None)
    if family is None or family.split_plan is None or (plan is not None and not family.whole_keys):
        return plan
    return {path: _in_diffusers_words(part) for path, part in family.split_plan(own.config).items()}


def _leave_keys_whole(module: Any, pattern: str) -> None:
    """Cross-attention whose keys are whole on every rank exchanges nothing."""
    for path, part in module.named_modules():
        if re.fullmatch(pattern, path):
            part.processor._parallel_config = None


def _one_for_all_tokens(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A timestep that a pipeline gives as `[B, 1]` is no row of tokens that could be split."""
    timestep = kwargs.get("timestep")
    one = isinstance(timestep, torch.Tensor) and timestep.ndim == 2 and timestep.shape[1] == 1
    return args, {**kwargs, "timestep": timestep[:, 0]} if one else kwargs  # type: ignore[index]


def _in_diffusers_words(part: Any) -> Any:
    if isinstance(part, SplitAxis):
        return ContextParallelOutput(gather_dim=part.axis, expected_dims=part.ndim)

    def given(axis: SplitAxis, *, of_result: bool) -> ContextParallelInput:
        return ContextParallelInput(split_dim=axis.axis, expected_dims=axis.ndim, split_output=of_result)

    return {
        name: [given(axis, of_result=False) for axis in axes] if isinstance(axes, tuple) else given(axes, of_result=isinstance(name, int))
        for name, axes in part.items()
    }


def enable_context_parallelism(module: Any, cp_plan: Any = None, mesh: Any = None, **degrees: Any) -> None:
    """`module.enable_parallelism` of diffusers with a `ContextParallelConfig` of these degrees.

    `cp_plan` is the model's own unless given, or its family's where diffusers has none that serves; `mesh` has the dimensions ring and
    ulysses and is made of all ranks unless given.

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
    own = unwrapped(module)
    family = family_of(own)
    if cp_plan is None and family is not None and family.whole_keys:
        _leave_keys_whole(own, family.whole_keys)
        own.register_forward_pre_hook(_one_for_all_tokens, with_kwargs=True)


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
    parts = denoisers(pipe)
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
