"""Attention calls of ranks without a model around them: random grids, uneven parts, everything that a split call may meet."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import scaled_dot_product_attention

from ditattn.backends.registry import load_backend
from ditattn.hosts.diffusers.dispatcher import dispatched_attention
from ditattn.hosts.diffusers.parallel import sequence_split
from ditattn.models import ModelFamily, TokenLayout
from ditattn.models.base import prefix_and_rest
from ditattn.plan.token_order import TokenOrder
from ditattn.runtime.served_model import ServedModel
from ditattn.runtime.stage import DenoisingStage
from ditattn.runtime.step import StepClock
from split_pipelines import PlanWatch, made_once

HEADS = 4


def _text_first(_config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    return TokenLayout((1, 1, *arguments["grid"]), (1, 1, 1), num_prefix_tokens=arguments["text"].shape[1])


FAMILY = ModelFamily("Test", (), _text_first, r"blocks\.\d+\.attn", streams=prefix_and_rest, num_heads=lambda _: HEADS)


def random_calls(backend: str, sparsity: float, degrees: Mapping[str, int], count: int) -> list[dict[str, Any]]:
    """So many calls of random sizes: what each is off from one process, or under ring from exact attention over its own plan."""
    config = _parallel(degrees)
    dice = random.Random(7)
    return [_compare(backend, sparsity, config, _size(dice, config), seed) for seed in range(count)]


def _parallel(degrees: Mapping[str, int]) -> ParallelConfig:
    ring, ulysses = degrees.get("ring_degree", 1), degrees.get("ulysses_degree", 1)
    # diffusers has no uneven split by both degrees together
    uneven = {} if ring > 1 and ulysses > 1 else {"ring_anything" if ring > 1 else "ulysses_anything": True}
    config = ContextParallelConfig(**degrees, **uneven)
    mesh = init_device_mesh("cpu", (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
    config.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh)
    return ParallelConfig(context_parallel_config=config)


def _size(dice: random.Random, config: ParallelConfig) -> tuple[int, tuple[int, int, int]]:
    """Text tokens, and a grid; multiples of the ranks where they must be."""
    degrees = config.context_parallel_config
    each = 1 if degrees.ring_anything or degrees.ulysses_anything else dist.get_world_size()
    return dice.randrange(0, 24, each), (dice.randint(5, 7), dice.randint(11, 18), dice.randint(12 // each, 18 // each) * each)


def _compare(backend: str, sparsity: float, config: ParallelConfig, size: tuple[int, tuple[int, int, int]], seed: int) -> dict[str, Any]:
    num_text, grid = size
    generator = torch.Generator().manual_seed(seed)
    text, video = torch.arange(num_text), torch.arange(num_text, num_text + grid[0] * grid[1] * grid[2])
    tensors = [torch.randn(1, num_text + len(video), HEADS, 32, generator=generator) for _ in range(3)]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = torch.cat([stream.tensor_split(ranks)[rank] for stream in (text, video)])
    by_own_plan = sparsity == 0.75 and config.context_parallel_config.ring_degree > 1
    out, report, watch = _served(backend, sparsity, num_text, grid, [x[:, own] for x in tensors], config, by_own_plan)
    gathered = torch.cat([stream.tensor_split(ranks)[place] for place in range(ranks) for stream in (text, video)])
    kept = all(_keeps_text(mask, order, gathered < num_text) for mask, order in zip(watch.masks, watch.orders, strict=True))
    found = {"size": size, "text kept": kept, "sparse": report.sparse, "off": watch.errors, "density": report.sparse_density}
    if by_own_plan:
        return found
    if sparsity == 0.75:
        expected = made_once(lambda: _served(backend, sparsity, num_text, grid, tensors, None)[0])
    else:
        expected = made_once(lambda: scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2))
    return {**found, "off": [float((out - expected[:, own]).abs().max())]}


def _keeps_text(mask: Tensor, order: TokenOrder, is_text: Tensor) -> bool:
    """Every query of a plan keeps the blocks with a text token, which are told by where those really stand among the gathered keys."""
    forward = torch.arange(order.length) if order.forward is None else order.forward
    standing = is_text[forward.expand(mask.shape[1], -1)]
    blocks = nn.functional.pad(standing, (0, -order.length % 128)).unflatten(-1, (-1, 128)).any(-1)
    return bool((mask | ~blocks.unsqueeze(1)).all())


def _served(
    backend: str,
    sparsity: float,
    num_text: int,
    grid: tuple[int, int, int],
    tensors: list[Tensor],
    config: ParallelConfig | None,
    exactly: bool = False,
) -> tuple[Tensor, Any, PlanWatch]:
    keys = {"sparsity": sparsity, "skip_first_steps": 0, "min_tokens": 0, **({"tail": False} if backend == "permuted_sparse_attn" else {})}
    cls = load_backend(backend)
    stage, watch, module = DenoisingStage(StepClock()), PlanWatch(exactly), nn.Identity()
    stage.probe = watch
    stage.models.append(ServedModel("transformer", FAMILY, None, cls, cls.get_config_cls().from_mapping(keys), ["blocks.0.attn"]))
    module._parallel_config = config
    arguments = {"grid": grid, "text": torch.empty(1, num_text), "timestep": 900}
    forward = stage.enter(stage.models[0], arguments, split=sequence_split(module))
    try:
        out = dispatched_attention(*tensors, _parallel_config=config)
    finally:
        stage.leave(forward)
    return out, stage.report().components["transformer"], watch
