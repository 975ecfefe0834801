"""What ranks of a group run: tiny pipelines in one piece and split between the ranks, and how far apart the two are."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any
from unittest import mock

import diffusers
import torch
import torch.distributed as dist
from diffusers.models._modeling_parallel import ContextParallelInput, TensorParallelConfig
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import scaled_dot_product_attention

import ditattn
import tiny_pipelines
from ditattn.backends.base import CallRecord
from ditattn.backends.permuted_sparse_attn import PermutedSparseAttentionBackend, PermutedSparseAttentionImpl
from ditattn.backends.setting import Setting
from ditattn.compare.rank_group import ALONE, RankGroup
from ditattn.compare.setting import Clip
from ditattn.errors import DitattnError
from ditattn.hosts.diffusers.dispatcher import dispatched_attention
from ditattn.hosts.diffusers.guidance_parallel import share_branches
from ditattn.hosts.diffusers.split import enable_context_parallelism, split_denoisers
from ditattn.hosts.diffusers.workload import PipelineWorkload
from ditattn.plan.block_plan import BlockPlan
from ditattn.plan.token_order import TokenOrder
from ditattn.runtime.probe import CellReading
from tiny_pipelines import FEW_TOKENS, TinyPipeline, few_tokens, packed_images
from tiny_pipelines.footprint import dispatcher_footprint, footprint
from tiny_pipelines.pipeline import ATTENTION, SIZES

HEADS = 4
SPARSE = {"sparsity": 0.75, "skip_first_steps": 0, "min_tokens": 0}
FAMILIES: dict[str, Callable[[], TinyPipeline]] = {
    "wan": tiny_pipelines.wan,
    "flux": tiny_pipelines.flux,
    "flux kontext": tiny_pipelines.flux_kontext,
    "qwen image": tiny_pipelines.qwen_image,
    "ltx video": tiny_pipelines.ltx_video,
}
"""Of every family with a plan for context parallelism in diffusers, and Flux 2 and ChronoEdit below."""

PLANNED: dict[str, Callable[[], TinyPipeline]] = {
    "hunyuan video": tiny_pipelines.hunyuan_video,
    "hunyuan video of whole words": lambda: _without_padding(tiny_pipelines.hunyuan_video()),
    "cogvideox": tiny_pipelines.cogvideox,
    "cogvideox with rotary positions": lambda: _with_rotary_positions(tiny_pipelines.cogvideox),
}
"""Those that are split by a plan of ours."""

FURTHER: dict[str, Callable[[], TinyPipeline]] = {
    "flux kontext, two grids": lambda: tiny_pipelines.flux_kontext((30, 44)),
    "qwen image edit": tiny_pipelines.qwen_image_edit,
    "ltx video with a condition": lambda: tiny_pipelines.ltx_condition((4, 1)),
    "flux 2": packed_images.flux2,
    "chronoedit": tiny_pipelines.chronoedit,
    "qwen image of padded words": lambda: _with_padding(tiny_pipelines.qwen_image()),
    "wan with token timesteps": tiny_pipelines.wan_with_token_timesteps,
    "wan of odd sizes": lambda: _resized(tiny_pipelines.wan(), height=144, width=208, num_frames=37),
    "ltx video of a pipeline for conditions": tiny_pipelines.ltx_condition,
}
"""Sequences of several grids, further families that diffusers has a plan for, and 10 x 9 x 13 tokens."""

GUIDED: dict[str, Callable[[], TinyPipeline]] = {
    "wan": tiny_pipelines.wan,
    "qwen image": tiny_pipelines.qwen_image,
    "ltx video": FAMILIES["ltx video"],
    "cogvideox": tiny_pipelines.cogvideox,
    "mochi": tiny_pipelines.mochi,
}
"""Two forwards in a step, or one of both branches; Mochi makes a call for each sample."""

WEIGHTS: dict[str, Callable[[], TinyPipeline]] = {
    "flux": tiny_pipelines.flux,
    "flux 2": packed_images.flux2,
    "qwen image": tiny_pipelines.qwen_image,
    "hunyuan video": tiny_pipelines.hunyuan_video,
}
"""Those whose weights diffusers can split, and one for torch's own tool."""

RING: dict[str, Callable[[], TinyPipeline]] = {
    "wan": tiny_pipelines.wan,
    "wan of odd sizes": FURTHER["wan of odd sizes"],
    "wan in whole blocks": lambda: _resized(tiny_pipelines.wan(), height=256, width=256, num_frames=21),
    "flux": tiny_pipelines.flux,
    "flux kontext": tiny_pipelines.flux_kontext,
    "flux kontext, two grids": FURTHER["flux kontext, two grids"],
    "qwen image": tiny_pipelines.qwen_image,
    "flux 2": packed_images.flux2,
    "chronoedit": tiny_pipelines.chronoedit,
    "flux of 12 words": lambda: _with_words(tiny_pipelines.flux(), 12),
    "hunyuan video": tiny_pipelines.hunyuan_video,
    "cogvideox with rotary positions": PLANNED["cogvideox with rotary positions"],
    "ltx video": tiny_pipelines.ltx_video,
    "ltx video behind a video": lambda: tiny_pipelines.ltx_condition((3, 5)),
}
"""Two ranks share 6 x 16 x 16 tokens by whole frames of two blocks each."""


BOTH: dict[str, Callable[[], TinyPipeline]] = {
    "wan": tiny_pipelines.wan,
    "wan in whole blocks": RING["wan in whole blocks"],
    "flux of 12 words": RING["flux of 12 words"],
    "flux kontext of 12 words, two grids": lambda: _with_words(tiny_pipelines.flux_kontext((30, 44)), 12),
    "qwen image of 12 words": lambda: _with_words(tiny_pipelines.qwen_image(), 12),
    "flux 2 of 12 words": lambda: _with_words(packed_images.flux2(), 12),
    "chronoedit": tiny_pipelines.chronoedit,
    "hunyuan video": tiny_pipelines.hunyuan_video,
    "cogvideox with rotary positions": PLANNED["cogvideox with rotary positions"],
    "ltx video": tiny_pipelines.ltx_video,
    "ltx video behind a video": RING["ltx video behind a video"],
}
"""Those for both degrees together: diffusers has no uneven split there, so four ranks must share every stream equally."""


class PlanWatch:
    """Keeps the plan of every call, the orders, and, `exactly`, what a call without a tail is off from attention over its own plan."""

    def __init__(self, exactly: bool = False) -> None:
        self.exactly = exactly
        self.masks: list[Tensor] = []
        self.orders: list[TokenOrder] = []
        self.query_orders: list[Any] = []
        self.errors: list[float] = []
        self.rows: list[Any] = []

    def look(self, forward: Any, _layer: Any, impl: Any, query: Tensor, key: Tensor, value: Tensor, metadata: Any, out: Tensor) -> None:
        for record in forward.records:
            if record.plan is not None:
                self.masks.append(record.plan.to_mask())
                self.orders.append(record.order)
                self.query_orders.append(record.query_order)
                self.rows.append(getattr(metadata, "rows", None))
                if self.exactly and record.query_order is not None and not getattr(metadata, "tail", False):
                    self.errors.append(_off(record, query, key, value, out, impl.softmax_scale, metadata.known_key_lengths))

    @property
    def dealt(self) -> list[int]:
        """How many queries each call had after rows were dealt out, calls alone before which they were."""
        return [rows.num_tokens for rows in self.rows if rows is not None and rows.dealt is not None]


def _off(record: CallRecord, query: Tensor, key: Tensor, value: Tensor, out: Tensor, scale: float, lengths: Any) -> float:
    """Largest difference to float64 attention over the tokens of the kept blocks; `lengths`: real keys of each batch element."""
    assert record.plan is not None
    assert record.order is not None
    assert record.query_order is not None
    keep = record.plan.to_mask().repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, : record.plan.query_length, : key.shape[1]]
    if lengths is not None:
        keep = keep & (torch.arange(key.shape[1]) < torch.tensor(lengths)[:, None, None, None])
    q, k, v = record.query_order.apply(query), record.order.apply(key), record.order.apply(value)
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    exact = scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale).transpose(1, 2)
    return float((record.query_order.apply(out) - exact).abs().max())


def build(name: str, heads: int = HEADS) -> TinyPipeline:
    """A pipeline whose denoiser has so many heads."""
    with contextlib.ExitStack() as changed:
        # tiny_pipelines.wan is the function
        for module in ("wan", "video"):
            changed.enter_context(mock.patch.object(sys.modules[f"tiny_pipelines.{module}"], "HEADS", heads))
        for settings in (ATTENTION, SIZES, packed_images.FLUX_SIZES):
            changed.enter_context(mock.patch.dict(settings, num_attention_heads=heads))
        return {**FAMILIES, **PLANNED, **FURTHER, **GUIDED, **WEIGHTS, **RING, **BOTH}[name]()


@cache
def whole(name: str) -> TinyPipeline:
    return build(name)


@cache
def split(name: str, degrees: tuple[tuple[str, Any], ...]) -> TinyPipeline:
    tiny = build(name)
    enable_context_parallelism(tiny.pipe.transformer, **dict(degrees))
    return tiny


def run(tiny: TinyPipeline, backend: str, config: Mapping[str, Any], steps: int = 1) -> tuple[Tensor, list[Tensor], Any]:
    """Latents, the plans of all calls, and the report."""
    watch = PlanWatch()
    with ditattn.install(tiny.pipe, backend, **config) as handle:
        handle.watch(watch)
        latents = tiny.run(steps)
    return latents, watch.masks, handle.report().components["transformer"]


def made_once(make: Callable[[], Any]) -> Any:
    """What `make` returns on the first rank, on every rank: a run in one piece is the same on all, and they share the cores."""
    made: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            made[0] = make()
        except Exception as error:  # noqa: BLE001
            # the others are waiting
            made[1] = error
    dist.broadcast_object_list(made, src=0)
    if made[1] is not None:
        raise made[1]
    return made[0]


def in_one_piece(name: str, backend: str, config: Mapping[str, Any], head_groups: int = 1) -> tuple[Tensor, list[Tensor], Any]:
    """What `run` returns for a pipeline that is not split. Split in whatever way, it is to do the same, so it runs once for all of them."""
    return made_once(lambda: _in_one_piece(name, backend, tuple(config.items()), head_groups))


@cache
def _in_one_piece(name: str, backend: str, config: tuple[tuple[str, Any], ...], head_groups: int) -> tuple[Tensor, list[Tensor], Any]:
    with _in_head_groups(head_groups):
        return run(whole(name), backend, dict(config))


def compare(name: str, backend: str, config: Mapping[str, Any], degrees: Mapping[str, Any]) -> dict[str, Any]:
    """A split run beside one in one piece: largest error, the share of plan entries that differ from those of this rank's heads, report."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    expected, plans, _ = in_one_piece(name, backend, config, ranks if backend == "permuted_sparse_attn" else 1)
    out, ours, report = run(split(name, tuple(degrees.items())), backend, config)
    share = HEADS // ranks
    of_rank = [mask[:, rank * share : (rank + 1) * share] for mask in plans]
    wrong = [float((mask != other).float().mean()) for mask, other in zip(ours, of_rank, strict=True)]
    return {"error": float((out - expected).abs().max()), "wrong": wrong, "report": report}


def compare_ring(
    name: str, backend: str, config: Mapping[str, Any], degrees: Mapping[str, Any], exactly: bool = False, beside: bool = True
) -> dict[str, Any]:
    """A run by each rank's own queries.

    Args:
        exactly: what its calls are off from attention over their own plans.
        beside: how far it is from a run in one piece; where blocks fall together, plan entries that differ from its rows.
    """
    watch = PlanWatch(exactly)
    tiny = split(name, tuple(degrees.items()))
    with ditattn.install(tiny.pipe, backend, **config) as handle:
        handle.watch(watch)
        out = tiny.run(1)
    report = handle.report().components["transformer"]
    found = {"off": watch.errors, "report": report, "dealt": watch.dealt}
    if not beside:
        return found
    expected, plans, _ = in_one_piece(name, backend, config)
    wrong, ulysses = [], degrees.get("ulysses_degree", 1)
    # permuted_sparse_attn has a budget for each rank
    if plans and not report.own_blocks and backend != "permuted_sparse_attn":
        share, place_of_heads = HEADS // ulysses, dist.get_rank() % ulysses
        plans = [mask[:, place_of_heads * share :][:, :share] for mask in plans]
        length = watch.orders[0].length
        place = watch.orders[0].inverse if watch.orders[0].inverse is not None else torch.arange(length)
        blocks = place[watch.query_orders[0].apply(watch.rows[0].tokens().unsqueeze(0))[0]][::128] // 128
        wrong = [float((mask != other[:, :, blocks]).float().mean()) for mask, other in zip(watch.masks, plans, strict=True)]
    return {**found, "error": float((out - expected).abs().max()), "wrong": wrong}


def compiled(name: str, degrees: Mapping[str, Any]) -> dict[str, Any]:
    """A split denoiser whose blocks are compiled beside one whose blocks are not: largest difference, queries after each deal, reports."""
    watches, found, reports = [PlanWatch(), PlanWatch()], [], []
    for watch in watches:
        tiny = build(name)
        enable_context_parallelism(tiny.pipe.transformer, **degrees)
        if watch is watches[1]:
            tiny.pipe.transformer.compile_repeated_blocks(backend="eager")
        with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE) as handle:
            handle.watch(watch)
            found.append(tiny.run(1))
        reports.append(handle.report().components["transformer"])
    return {"error": float((found[1] - found[0]).abs().max()), "dealt": [watch.dealt for watch in watches], "reports": reports}


def probed(name: str, backend: str, degrees: Mapping[str, Any]) -> tuple[list[CellReading], list[CellReading]]:
    """What a setting would do to a dense run: in one piece, and split, where every rank looks at its own part."""
    setting, group = Setting.parse(backend, SPARSE), RankGroup(dist.get_rank(), dist.get_world_size())

    def readings(tiny: TinyPipeline, group: RankGroup) -> list[CellReading]:
        workload = PipelineWorkload(tiny.pipe, lambda _: {**tiny.arguments, "num_inference_steps": 1}, group=group)
        # nobody looks at the pixels
        with mock.patch.object(tiny.pipe.vae, "decode", lambda latents, return_dict: (latents[:, :3],)):
            (found,) = workload.probe([setting], Clip("", 0))
        return found

    return made_once(lambda: readings(whole(name), ALONE)), readings(split(name, tuple(degrees.items())), group)


def tensor_parallel(name: str, backend: str, config: Mapping[str, Any], by_hand: bool = False) -> dict[str, Any]:
    """As `compare`, for weights that are split: by diffusers, or by torch's own tool."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    expected, plans, of_one = in_one_piece(name, backend, config, ranks if backend == "permuted_sparse_attn" else 1)
    tiny = build(name)
    _split_weights(tiny.pipe.transformer, by_hand)
    out, ours, report = run(tiny, backend, config)
    share = HEADS // ranks
    # layers whose weights are whole have all heads
    of_rank = [mask[:, rank * share :][:, :share] if own.shape[1] == share else mask for own, mask in zip(ours, plans, strict=True)]
    wrong = [float((mask != other).float().mean()) for mask, other in zip(ours, of_rank, strict=True)]
    heads = {mask.shape[1] for mask in ours}
    return {"error": float((out - expected).abs().max()), "wrong": wrong, "report": report, "of one": of_one, "heads": heads}


def _split_weights(model: Any, by_hand: bool) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if not by_hand:
        # diffusers names accelerators only
        with (
            mock.patch("diffusers.hooks.tensor_parallel._SUPPORTED_TP_DEVICES", ("cpu",)),
            mock.patch("torch.accelerator.device_count", return_value=1),
        ):
            model.enable_parallelism(config=TensorParallelConfig(mesh=mesh))
        return
    for block in model.transformer_blocks:
        columns = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
        plan = {
            **{f"attn.{name}": ColwiseParallel() for name in columns},
            "attn.to_out.0": RowwiseParallel(),
            "attn.to_add_out": RowwiseParallel(),
        }
        parallelize_module(block, mesh, plan)
        block.attn.heads //= mesh.size()


def guided(name: str, backend: str, config: Mapping[str, Any], degrees: Mapping[str, Any]) -> dict[str, Any]:
    """As `compare`, for ranks that share the branches of guidance; steps enough to share some."""
    # so few that a sparse backend would drop none
    few = name in FEW_TOKENS and backend == "torch_sdpa"

    def built() -> TinyPipeline:
        return few_tokens(build(name), name) if few else build(name)

    expected, _, of_one = made_once(lambda: run(built(), backend, config, steps=3))
    tiny = built()
    split_denoisers(tiny.pipe, cfg_parallel=True, **degrees)
    out, _, report = run(tiny, backend, config, steps=3)
    again, _, _ = run(tiny, backend, config, steps=3)
    errors = [float((latents - expected).abs().max()) for latents in (out, again)]
    return {"error": max(errors), "report": report, "of one": of_one}


def unguided() -> tuple[str, float]:
    """What is said where a step has one forward; how far a run is off that shares nothing, after that."""
    tiny = build("wan")
    forward = vars(tiny.pipe.transformer).get("forward")
    remove = share_branches(tiny.pipe.transformer, dist.group.WORLD)
    message = _message(lambda: tiny.run(3, guidance_scale=1.0))
    error = float((tiny.run(3) - whole("wan").run(3)).abs().max())
    remove()
    assert vars(tiny.pipe.transformer).get("forward") is forward
    return message, max(error, float((tiny.run(2) - whole("wan").run(2)).abs().max()))


def given_bricks() -> dict[str, int]:
    """Orders that this rank's heads took of those that a configuration names for four."""
    names = ("1x8x16,1x8x16,4x2x16,4x4x8",) * 2
    _, _, report = run(split("wan", (("ulysses_degree", 2),)), "permuted_sparse_attn", {**SPARSE, "head_bricks": names})
    orders: dict[str, int] = report.token_orders
    return orders


def fully_sharded() -> dict[str, Any]:
    """Weights that are split where they lie and whole where a layer runs."""
    names = ("1x8x16,1x8x16,4x2x16,4x4x8",) * 2
    config = {**SPARSE, "head_bricks": names}
    expected, _, _ = in_one_piece("wan", "permuted_sparse_attn", config)
    tiny, mesh = build("wan"), init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*tiny.pipe.transformer.blocks, tiny.pipe.transformer):
        fully_shard(part, mesh=mesh)
    out, _, report = run(tiny, "permuted_sparse_attn", config)
    return {"error": float((out - expected).abs().max()), "report": report}


def given_bricks_of_split_weights() -> dict[str, int]:
    """As `given_bricks`, where weights are split after the installation, those of the first of two layers."""
    tiny = build("hunyuan video")
    with ditattn.install(tiny.pipe, "permuted_sparse_attn", **SPARSE, head_bricks=("1x8x16,1x8x16,4x2x16,4x4x8",) * 2) as handle:
        _split_weights(tiny.pipe.transformer, by_hand=True)
        tiny.run(1)
    orders: dict[str, int] = handle.report().components["transformer"].token_orders
    return orders


def too_many_bricks() -> str:
    """What is said of an entry for four heads where two ranks share three."""
    tiny = build("wan", 3)
    enable_context_parallelism(tiny.pipe.transformer, ulysses_degree=2, ulysses_anything=True)
    return _message(lambda: run(tiny, "permuted_sparse_attn", {**SPARSE, "head_bricks": ("1x8x16,1x8x16,4x2x16,4x4x8",) * 2}))


def with_defaults() -> dict[str, Any]:
    """A run by the keys' defaults, whose first dense steps are a share of all."""
    config = {"sparsity": 0.75, "min_tokens": 0}
    expected, _, of_one = made_once(lambda: run(whole("wan"), "rain_fusion_attn", config, steps=4))
    out, _, report = run(split("wan", (("ulysses_degree", 2),)), "rain_fusion_attn", config, steps=4)
    return {"error": float((out - expected).abs().max()), "report": report, "of one": of_one}


def three_heads() -> tuple[str, float, set[int]]:
    """What is said where heads do not divide; the error where they need not; heads of this rank."""
    expected, plans, _ = run(build("wan", 3), "rain_fusion_attn", SPARSE)
    refusing, sharing = build("wan", 3), build("wan", 3)
    enable_context_parallelism(refusing.pipe.transformer, ulysses_degree=2)
    refusal = _message(lambda: run(refusing, "rain_fusion_attn", SPARSE))
    enable_context_parallelism(sharing.pipe.transformer, ulysses_degree=2, ulysses_anything=True)
    out, ours, _ = run(sharing, "rain_fusion_attn", SPARSE)
    start = 2 * dist.get_rank()
    assert all(torch.equal(mask, other[:, start : start + 2]) for mask, other in zip(ours, plans, strict=True))
    return refusal, float((out - expected).abs().max()), {mask.shape[1] for mask in ours}


def odd_words_for_both_degrees() -> str:
    """What is said of ten words for four ranks, where diffusers has no uneven split."""
    tiny = build("flux")
    enable_context_parallelism(tiny.pipe.transformer, ulysses_degree=2, ring_degree=2)
    return _message(lambda: run(tiny, "torch_sdpa", {}))


def both_orders() -> dict[str, Any]:
    """Installed before the split and after it; what is left of either when it is undone."""
    before, after = build("wan"), build("wan")
    dispatcher, native = dispatcher_footprint(), before.run(1)
    handle = ditattn.install(before.pipe, "rain_fusion_attn", **SPARSE)
    for tiny in (before, after):
        enable_context_parallelism(tiny.pipe.transformer, ulysses_degree=2)
    split_only = footprint(after.pipe)
    with handle:
        first = before.run(1)
    with ditattn.install(after.pipe, "rain_fusion_attn", **SPARSE):
        second = after.run(1)
    left = {part for part, found in footprint(after.pipe).items() if part != "dispatcher" and found != split_only[part]}
    left |= {name for name, found in dispatcher_footprint().items() if found != dispatcher[name]}
    errors = [float((tiny.run(1) - native).abs().max()) for tiny in (before, after)]
    return {"same": torch.equal(first, second) and not torch.equal(first, native), "dense afterwards": max(errors), "left": left}


def split_by_others() -> dict[str, Any]:
    """A program that splits tokens by hooks and a group of its own, without a word to diffusers."""
    tiny = build("wan")
    model, place = tiny.pipe.transformer, dist.get_rank()

    def own(x: Tensor) -> Tensor:
        return x.chunk(dist.get_world_size(), dim=1)[place]

    def take_part(block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states, text, timestep, rotary = args
        return own(hidden_states) if block is model.blocks[0] else hidden_states, text, timestep, tuple(map(own, rotary))

    def gather(_module: Any, _args: Any, out: Tensor) -> Tensor:
        parts = [torch.empty_like(out) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, out.contiguous())
        return torch.cat(parts, 1)

    for block in model.blocks:
        block.register_forward_pre_hook(take_part)
    model.proj_out.register_forward_hook(gather)
    _, _, report = run(tiny, "rain_fusion_attn", SPARSE)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE, strict=True):
        refusal = _message(lambda: tiny.run(1))
    return {"report": report, "refusal": refusal}


def refusals() -> dict[str, str]:
    """What is said to splits that are not served."""
    plan = {"transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)}}
    before, after = tiny_pipelines.consisid(), tiny_pipelines.consisid()
    hunyuan, odd = tiny_pipelines.hunyuan_video(), build("wan")
    messages = {}
    _split_by(before, plan)
    messages["unknown streams before"] = _message(lambda: ditattn.install(before.pipe, "rain_fusion_attn"))
    positions = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
    text_whole = {"rope": {0: positions, 1: positions}, **plan}
    for name, tiny, its_plan in (("unknown streams after", after, plan), ("a stream left whole", hunyuan, text_whole)):
        with ditattn.install(tiny.pipe, "torch_sdpa"):
            _split_by(tiny, its_plan)
            messages[name] = _message(lambda tiny=tiny: tiny.run(1))
    enable_context_parallelism(odd.pipe.transformer, ulysses_degree=2)
    config = odd.pipe.transformer._parallel_config
    for block in odd.pipe.transformer.blocks:
        block.attn1.processor._parallel_config = None
    conditions = build("ltx video with a condition")
    _split_by(conditions, conditions.pipe.transformer._cp_plan)
    messages["timesteps of tokens"] = _message(lambda: run(conditions, "torch_sdpa", {}))
    messages["processor without it"] = _message(lambda: run(odd, "torch_sdpa", {}))
    q, k = torch.zeros(1, 4, 4, 32), torch.zeros(1, 4, 2, 32)
    messages["fewer key heads"] = _message(lambda: dispatched_attention(q, k, k, _parallel_config=config))
    messages["causal"] = _message(lambda: dispatched_attention(q, q, q, is_causal=True, _parallel_config=config))
    return messages


def _split_by(tiny: TinyPipeline, plan: dict[str, Any]) -> None:
    enable_context_parallelism(tiny.pipe.transformer, cp_plan=plan, ulysses_degree=2)


def _message(call: Callable[[], Any]) -> str:
    """Of the error that the call raises."""
    try:
        call()
    except DitattnError as error:
        return str(error)
    return "no error"


@contextlib.contextmanager
def _in_head_groups(groups: int) -> Iterator[None]:
    """permuted_sparse_attn hands out one budget over the heads of a call: give every group of heads its own, as ranks do."""
    if groups == 1:
        yield
        return

    class InGroups(PermutedSparseAttentionImpl):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any) -> Tensor:
            heads, seen = query.shape[2] // groups, self.__dict__.setdefault("seen", [])
            if "parts" not in self.__dict__:
                make = PermutedSparseAttentionImpl
                self.parts = [make(heads, self.head_size, self.softmax_scale, observer=seen.append) for _ in range(groups)]
            seen.clear()
            tensors = (x.split(heads, dim=2) for x in (query, key, value))
            out = [part.forward(q, k, v, attn_metadata) for part, q, k, v in zip(self.parts, *tensors, strict=True)]
            masks = [record.plan.to_mask() for record in seen if record.plan is not None]
            plan = BlockPlan.from_mask(torch.cat(masks, 1), query.shape[1], key.shape[1]) if masks else None
            self._note(CallRecord(seen[0].reason, plan))
            return torch.cat(out, 2)

    with mock.patch.object(PermutedSparseAttentionBackend, "impl_cls", InGroups):
        yield


def _with_words(tiny: TinyPipeline, count: int) -> TinyPipeline:
    for name, given in list(tiny.arguments.items()):
        if name in ("prompt_embeds", "negative_prompt_embeds"):
            tiny.arguments[name] = given.repeat(1, 2, 1)[:, :count]
        elif name in ("prompt_embeds_mask", "negative_prompt_embeds_mask") and given is not None:
            tiny.arguments[name] = given.repeat(1, 2)[:, :count]
    return tiny


def _with_padding(tiny: TinyPipeline) -> TinyPipeline:
    """Five words, of which the last two are padding in front of the image: four ranks cannot share them equally."""
    tiny = _with_words(tiny, 5)
    for key in ("prompt_embeds_mask", "negative_prompt_embeds_mask"):
        tiny.arguments[key] = (torch.arange(5) < 3).long().unsqueeze(0)
    return tiny


def _without_padding(tiny: TinyPipeline) -> TinyPipeline:
    tiny.arguments["prompt_attention_mask"] = torch.ones_like(tiny.arguments["prompt_attention_mask"])
    return tiny


def _with_rotary_positions(build_cogvideox: Callable[[], TinyPipeline]) -> TinyPipeline:
    """As CogVideoX of 5 B parameters has them."""
    made = diffusers.CogVideoXTransformer3DModel
    with mock.patch.object(diffusers, "CogVideoXTransformer3DModel", partial(made, use_rotary_positional_embeddings=True)):
        return build_cogvideox()


def _resized(tiny: TinyPipeline, **size: int) -> TinyPipeline:
    tiny.arguments |= size
    return tiny
