"""CFG parallelism: two halves of the ranks share the two branches of classifier-free guidance.

diffusers 0.42.1 has none. Pipelines that guide within one batch have it split. Of those that make two forwards in a step, each half of the
ranks makes one; the other one returns at once. Its tensor is filled when both are there, which is before such a pipeline looks at either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditattn.errors import UnsupportedCall
from ditattn.hosts.diffusers.hooks import bind_arguments

__all__ = ["BRANCHES", "share_branches"]

BRANCHES = 2


def share_branches(module: nn.Module, group: Any) -> Callable[[], None]:
    """Share the branches of guidance between the two ranks of `group`, each of which calls the denoiser as if it were alone.

    Call it after `enable_parallelism`, which puts its exchanges into the denoiser's forward. Returns the removal.
    """
    is_own, forward = "forward" in vars(module), module.forward
    branches = _Branches(module, forward, group)
    module.forward = branches.forward
    # before whatever looks at a forward's arguments, so that it sees what this rank computes
    hook = module.register_forward_pre_hook(branches.take_part, with_kwargs=True, prepend=True)

    def remove() -> None:
        hook.remove()
        if is_own:
            module.forward = forward
        else:
            del module.forward

    return remove


class _Branches:
    """What one denoiser's forwards are to this rank."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], group: Any) -> None:
        self._name, self._forward, self._group = type(module).__name__, forward, group
        self._module, self._signature = module, inspect.signature(type(module).forward)
        self._rank = dist.get_rank(group)
        self._in_batch = False
        self._forget_run()

    def take_part(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """This rank's half of the batch, where it has two halves."""
        arguments = bind_arguments(self._signature, self._module, args, kwargs)
        batch = _batch(arguments)
        self._in_batch = batch % BRANCHES == 0
        if not self._in_batch:
            return args, kwargs

        def own(value: Any) -> Any:
            is_batch = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch
            # a pair of tensors is a cosine and a sine, a list of other things has an entry for each sample
            is_list = isinstance(value, list) and len(value) == batch and not any(isinstance(one, Tensor) for one in value)
            part = batch // BRANCHES
            return value[self._rank * part : (self._rank + 1) * part] if is_batch or is_list else value

        return tuple(map(own, args)), {name: own(value) for name, value in kwargs.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._in_batch:
            out = self._forward(*args, **kwargs)
            return _with_sample(out, torch.cat(self._gathered(_sample(out))))
        try:
            return self._one_of_two(args, kwargs)
        except BaseException:
            self._forget_run()
            raise

    def _forget_run(self) -> None:
        self._timestep, self._count, self._shares = float("-inf"), 0, False

    def _one_of_two(self, args: Any, kwargs: Any) -> Any:
        timestep = _timestep(self._name, bind_arguments(self._signature, self._module, args, kwargs))
        if timestep != self._timestep or self._count == BRANCHES:
            self._begin_step(timestep)
        self._count += 1
        if not self._shares:
            out = self._forward(*args, **kwargs)
            self._like = _sample(out)
            return out
        return self._first(args, kwargs) if self._count % BRANCHES else self._second(args, kwargs)

    def _begin_step(self, timestep: float) -> None:
        """The first step of a run is made by all ranks: it shows how many forwards a step has, and what they return.

        Raises:
            UnsupportedCall: not two.
        """
        begins_run = timestep >= self._timestep
        if not begins_run and self._count != BRANCHES:
            raise UnsupportedCall(
                f"ranks cannot share the branches of guidance: a step of the {self._name} had {self._count} forwards of an odd batch, not "
                f"{BRANCHES}; is guidance switched on (a guidance_scale above 1, for some pipelines a negative prompt)?"
            )
        self._shares, self._count, self._timestep = not begins_run, 0, timestep

    def _first(self, args: Any, kwargs: Any) -> Any:
        if self._rank == 0:
            out = self._forward(*args, **kwargs)
            self._result = _sample(out)
            return out
        # not a number until it is known: nobody could take it for a result
        self._result = torch.full_like(self._like, torch.nan)
        return _as_asked(self._result, kwargs)

    def _second(self, args: Any, kwargs: Any) -> Any:
        first, second = self._gathered(self._result if self._rank == 0 else _sample(self._forward(*args, **kwargs)))
        if self._rank:
            self._result.copy_(first)
        return _as_asked(second, kwargs)

    def _gathered(self, own: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(BRANCHES)]
        dist.all_gather(parts, own.contiguous(), group=self._group)
        return parts


def _batch(arguments: Mapping[str, Any]) -> int:
    latents = arguments.get("hidden_states")
    return int(latents.shape[0]) if isinstance(latents, Tensor) else 1


def _timestep(name: str, arguments: Mapping[str, Any]) -> float:
    timestep = arguments.get("timestep")
    if timestep is None:
        raise UnsupportedCall(
            f"ranks cannot share the branches of guidance: the {name} has no argument timestep, by which steps are told apart"
        )
    return float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)


def _sample(out: Any) -> Tensor:
    sample = out[0] if isinstance(out, tuple) else out.sample
    if not isinstance(sample, Tensor) or (isinstance(out, tuple) and len(out) > 1):
        raise UnsupportedCall("ranks cannot share the branches of guidance: the denoiser returns more than one tensor")
    return sample


def _with_sample(out: Any, sample: Tensor) -> Any:
    return (sample,) if isinstance(out, tuple) else type(out)(sample=sample)


def _as_asked(sample: Tensor, kwargs: Mapping[str, Any]) -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample) if kwargs.get("return_dict", True) else (sample,)
