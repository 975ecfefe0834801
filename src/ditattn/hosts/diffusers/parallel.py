"""Attention of a denoiser that diffusers has split between ranks by `enable_parallelism(config=ContextParallelConfig(...))`.

Under Ulysses diffusers' own exchange brings the whole sequence of some heads here and takes the result back; under ring everybody's keys
are gathered. Both stand on private names of diffusers, which tests/hosts/diffusers/test_dispatcher.py pins.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NoReturn

import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.context_parallel import ContextParallelSplitHook, EquipartitionSharder
from diffusers.models import attention_dispatch
from diffusers.models._modeling_parallel import gather_size_by_comm
from torch import Tensor, nn

from ditattn.errors import UnsupportedCall, UnsupportedModel
from ditattn.models import ModelFamily, unwrapped
from ditattn.runtime.attend import attend
from ditattn.runtime.forward import running
from ditattn.runtime.split import SequenceSplit, TensorSplit

__all__ = [
    "attend_in_parallel",
    "check_split",
    "check_timesteps",
    "sequence_split",
    "tensor_split",
]


def sequence_split(module: nn.Module) -> SequenceSplit | None:
    """How the denoiser's tokens are split between ranks at present; None if they are not."""
    config = getattr(getattr(unwrapped(module), "_parallel_config", None), "context_parallel_config", None)
    if config is None:
        return None
    rank = config._ring_local_rank * config.ulysses_degree + config._ulysses_local_rank
    even = not (config.ulysses_anything or config.ring_anything)
    exchange = partial(_exchanged_rows, group=config._ring_mesh.get_group()) if config.ring_degree > 1 else None
    return SequenceSplit(config.ulysses_degree, config.ring_degree, rank, even, exchange)


def tensor_split(module: nn.Module, attention: nn.Module) -> TensorSplit | None:
    """How the weights of a denoiser are split between ranks, as one of its attention modules has them; None if they are not.

    diffusers' `TensorParallelConfig` and torch's `parallelize_module` are known. Weights that FSDP splits are whole when a layer runs.
    """
    config = getattr(getattr(unwrapped(module), "_parallel_config", None), "tensor_parallel_config", None)
    if config is not None:
        return TensorSplit(config._mesh.size(), config._mesh.get_local_rank())
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    splits = (_row_split(parameter) for parameter in attention.parameters())
    return next((split for split in splits if split is not None and not _is_fully_sharded(module)), None)


def _row_split(parameter: Tensor) -> TensorSplit | None:
    """How the rows of a weight, which make the columns of its product, are split; None if they are not."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return None
    places = [place for place, placement in enumerate(parameter.placements) if placement.is_shard(0)]
    mesh = parameter.device_mesh
    return TensorSplit(mesh.size(places[-1]), mesh.get_local_rank(places[-1])) if places else None


def _is_fully_sharded(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in module.modules())


def check_split(name: str, module: nn.Module, family: ModelFamily) -> None:
    """Raise UnsupportedModel if the denoiser is split between ranks in a way that is not served."""
    split = sequence_split(module)
    if split is None:
        if any(getattr(getattr(part, "processor", None), "_parallel_config", None) is not None for part in module.modules()):
            raise UnsupportedModel(
                f"{name}: its attention processors are set for context parallelism, it is not: call its enable_parallelism"
            )
        return
    if family.streams is None:
        raise UnsupportedModel(f"{name} is split between ranks, and how the tokens of {family.name} are split is not known here")


def check_timesteps(module: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Raise UnsupportedCall if every token of a split denoiser has a timestep of its own, and nobody splits those."""
    timestep = arguments.get("timestep")
    if not isinstance(timestep, Tensor) or timestep.ndim < 2 or timestep.shape[1] == 1:
        return
    hooks = HookRegistry.check_if_exists_or_initialize(module).hooks.values()
    if not any("timestep" in hook.metadata for hook in hooks if isinstance(hook, ContextParallelSplitHook)):
        raise UnsupportedCall(
            f"every token of the {type(module).__name__} has a timestep of its own, and the plan by which it is split between ranks leaves "
            'them whole: call its enable_parallelism with a cp_plan that has, under "" and beside what its own has, '
            '"timestep": ContextParallelInput(split_dim=1, expected_dims=2)'
        )


def attend_in_parallel(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, dropout_p: float, is_causal: bool, scale: float | None, config: Any
) -> Tensor:
    """`attend` for this rank's part of the tokens, `[B, S / ranks, H, D]` in and out.

    Raises:
        UnsupportedCall: heads that the ranks cannot share, fewer key heads than query heads, causal attention.
    """
    degrees = config.context_parallel_config
    _check(query, key, is_causal, degrees)
    forward = running()
    if forward is not None and forward.split is None:
        raise UnsupportedCall(f"{forward.model.name}: an attention processor is set for context parallelism, its denoiser is not")
    if forward is None or torch.compiler.is_compiling():
        return _exchanged(query, key, value, attn_mask, dropout_p, scale, config, attend)
    watch = forward.model.log.communication
    with ExitStack() as stretch:
        stretch.enter_context(watch.measure(query.device))

        def attend_between(*call: Any) -> Tensor:
            stretch.close()
            out = attend(*call)
            stretch.enter_context(watch.measure(query.device))
            return out

        return _exchanged(query, key, value, attn_mask, dropout_p, scale, config, attend_between)


def _exchanged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    dropout_p: float,
    scale: float | None,
    config: Any,
    compute: Any,
) -> Tensor:
    """Exchanges around `compute`, which gets the whole sequence of this rank's heads, or its own queries and everybody's keys."""
    if config.context_parallel_config.ring_degree > 1:
        return _with_all_keys(query, key, value, attn_mask, dropout_p, scale, config.context_parallel_config, compute)

    if attn_mask is not None and attn_mask.shape[-1] == key.shape[1]:
        # diffusers 0.42.1 pads uneven parts to equal ones and cuts the end alone: of three ranks' masks the padding stays in the middle
        attn_mask = _gathered(attn_mask, attn_mask.ndim - 1, config.context_parallel_config._ulysses_mesh, config.context_parallel_config)

    def forward_op(
        _ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout_p: float, is_causal: bool, scale: float | None, *_: Any, **__: Any
    ) -> Tensor:
        out: Tensor = compute(q, k, v, mask, dropout_p, is_causal, scale)
        return out

    exchanged: Tensor = attention_dispatch._templated_context_parallel_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        False,
        scale,
        False,
        False,
        forward_op=forward_op,
        backward_op=_no_backward,
        _parallel_config=config,
    )
    return exchanged


def _with_all_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    dropout_p: float,
    scale: float | None,
    degrees: Any,
    compute: Any,
) -> Tensor:
    """One rectangular call where diffusers' ring merges a call for each rank, which it gathers all keys for too.

    Its merge makes NaN of a row that keeps nothing of one rank's keys, and takes the mask of this rank's keys for those of every rank.
    """
    if attn_mask is not None and attn_mask.shape[-1] == key.shape[1]:
        attn_mask = _gathered(attn_mask, attn_mask.ndim - 1, degrees._flattened_mesh, degrees)
    group = degrees._ulysses_mesh.get_group()
    if degrees.ulysses_degree > 1:
        query, key, value = (attention_dispatch.SeqAllToAllDim.apply(group, x, 2, 1) for x in (query, key, value))
    key, value = _gathered(torch.stack([key, value]), 2, degrees._ring_mesh, degrees)
    out: Tensor = compute(query, key, value, attn_mask, dropout_p, False, scale)
    if degrees.ulysses_degree > 1:
        out = attention_dispatch.SeqAllToAllDim.apply(group, out, 1, 2)
    return out


def _exchanged_rows(x: Tensor, to_each: list[int], from_each: list[int], group: Any) -> Tensor:
    """`[B, R, H, D]`: so many rows to each rank of the group, so many from each."""
    rows = x.transpose(0, 1).contiguous()
    exchanged = rows.new_empty(sum(from_each), *rows.shape[1:])
    torch.distributed.all_to_all_single(exchanged, rows, from_each, to_each, group=group)
    return exchanged.transpose(0, 1)


def _gathered(x: Tensor, dim: int, mesh: Any, degrees: Any) -> Tensor:
    """Every rank's part of `x`, behind each other along `dim`."""
    if not (degrees.ring_anything or degrees.ulysses_anything):
        return _gathered_equal(x, dim, mesh)
    lengths = gather_size_by_comm(x.shape[dim], mesh.get_group())
    # gloo gathers equal parts only
    spare = x.new_zeros([max(lengths) - size if axis == dim else size for axis, size in enumerate(x.shape)])
    parts = _gathered_equal(torch.cat([x, spare], dim), dim, mesh).chunk(len(lengths), dim)
    return torch.cat([part.narrow(dim, 0, length) for part, length in zip(parts, lengths, strict=True)], dim)


def _gathered_equal(x: Tensor, dim: int, mesh: Any) -> Tensor:
    gathered: Tensor = EquipartitionSharder.unshard(x, dim, mesh)
    return gathered


def _no_backward(*_: Any, **__: Any) -> NoReturn:
    raise UnsupportedCall("this package is forward only")


def _check(query: Tensor, key: Tensor, is_causal: bool, degrees: Any) -> None:
    heads, ulysses = query.shape[2], degrees.ulysses_degree
    if is_causal:
        raise UnsupportedCall("causal attention is not served under context parallelism")
    if key.shape[2] != heads:
        raise UnsupportedCall(
            f"{key.shape[2]} key heads for {heads} query heads are not served under context parallelism: they must be as many"
        )
    spare = -heads % ulysses
    if not spare:
        return
    possible = spare < (heads + spare) // ulysses
    if not degrees.ulysses_anything:
        uneven = (
            ", or ContextParallelConfig(..., ulysses_anything=True) (--uneven-split), which gives the last rank fewer" if possible else ""
        )
        raise UnsupportedCall(f"ulysses_degree={ulysses} does not divide the {heads} heads: {_fitting(heads)}{uneven}")
    if not possible:
        raise UnsupportedCall(f"{heads} heads are too few for ulysses_degree={ulysses}: its last rank would have none; {_fitting(heads)}")


def _fitting(heads: int) -> str:
    """Which degrees would do, for messages."""
    dividing = [str(degree) for degree in range(2, heads + 1) if heads % degree == 0]
    return f"choose {' or '.join(dividing[:3])}, or a ring_degree" if dividing else "choose a ring_degree"
