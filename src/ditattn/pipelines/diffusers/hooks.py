"""How a denoiser's forward becomes known: a hook on its root, light hooks on its self-attention modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ditattn.pipelines.denoising import DenoisingStage, Forward, ServedModel, attend, running

__all__ = ["add_layer_hooks", "add_root_hook", "bind_arguments", "enter_layer", "leave_layer"]

HOOK_NAME = "ditattn"


def bind_arguments(signature: inspect.Signature, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A forward's arguments by name."""
    return dict(signature.bind_partial(module, *args, **kwargs).arguments)


class _NoState(BaseState):
    def reset(self) -> None:
        """Nothing to forget."""


class _ContextSink(StateManager):
    """Receives `cache_context()`: a string up to diffusers 0.40, an object with the step index from 0.41 on."""

    def __init__(self) -> None:
        super().__init__(_NoState)
        self.pushed: Any = None

    @property
    def branch(self) -> str | None:
        """Name of the CFG branch."""
        return self.pushed if self.pushed is None or isinstance(self.pushed, str) else self.pushed.name

    def set_context(self, context: Any) -> None:
        self.pushed = context

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self.pushed = None


class RootHook(ModelHook):
    """Wraps the denoiser's forward. Not pre_forward and post_forward: the latter is skipped when the forward raises."""

    # so that cache_context() and the reset at the end of a pipeline call arrive
    _is_stateful = True

    def __init__(self, stage: DenoisingStage, model: ServedModel) -> None:
        super().__init__()
        self._stage, self._model = stage, model
        self._sink = _ContextSink()
        self._signature: inspect.Signature | None = None

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self._signature = inspect.signature(type(module).forward)
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's forward, known to its attention calls while it runs."""
        forward = self._enter(module, args, kwargs)
        try:
            if self._model.family.dispatches:
                return self.fn_ref.original_forward(*args, **kwargs)
            with _SdpaRedirect():
                return self.fn_ref.original_forward(*args, **kwargs)
        finally:
            self._leave(forward)

    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward:
        assert self._signature is not None
        arguments = bind_arguments(self._signature, module, args, kwargs)
        return self._stage.enter(self._model, arguments, self._sink.pushed, self._sink.branch)

    @torch.compiler.disable
    def _leave(self, forward: Forward) -> None:
        self._stage.leave(forward)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """diffusers calls this at the end of every pipeline call."""
        self._sink.reset()
        self._stage.reset()
        return module


class _SdpaRedirect(TorchFunctionMode):
    """For families that call torch's SDPA directly, with `[B, H, S, D]`: inside their self-attention modules the call comes to us.

    In a compiled graph no module hook runs, so there every call of the denoiser is taken, and the layer is counted in the operation.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        # torch takes the mode off while it runs, so that the SDPA call of our own kernel does not come back here
        if func is nn.functional.scaled_dot_product_attention and (torch.compiler.is_compiling() or _in_served_layer()):
            return _attend_bhsd(*args, **kwargs)
        return func(*args, **kwargs)


def _in_served_layer() -> bool:
    forward = running()
    return forward is not None and forward.layer is not None


def _attend_bhsd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`attend` behind the signature and layout of torch's SDPA."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attend(q, k, v, attn_mask, dropout_p, is_causal, scale).transpose(1, 2)


def add_root_hook(module: nn.Module, stage: DenoisingStage, model: ServedModel) -> Callable[[], None]:
    """Publish every forward of `module`. Returns the removal, which leaves the module exactly as it was."""
    had_registry, had_forward = hasattr(module, "_diffusers_hook"), "forward" in vars(module)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(RootHook(stage, model), HOOK_NAME)

    def remove() -> None:
        registry.remove_hook(HOOK_NAME, recurse=False)
        if registry.hooks:
            # another hook was added on top and still needs the registry
            return
        if not had_forward:
            vars(module).pop("forward", None)
        if not had_registry:
            del module._diffusers_hook

    return remove


def enter_layer(layer: int | None) -> None:
    """Self-attention layer number `layer` begins; None for a module that is not served."""
    # a compiled graph runs no Python here: there the layer is counted inside the operation
    if torch.compiler.is_compiling():
        return
    forward = running()
    if forward is not None:
        forward.layer = layer


def leave_layer() -> None:
    """The attention module ended."""
    enter_layer(None)


def add_layer_hooks(layers: list[nn.Module]) -> Callable[[], None]:
    """Tell the running forward which layer runs. Returns the removal."""
    handles = []
    for number, module in enumerate(layers):

        def begin(_module: nn.Module, _args: Any, number: int = number) -> None:
            enter_layer(number)

        def end(_module: nn.Module, _args: Any, _output: Any) -> None:
            leave_layer()

        handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove
