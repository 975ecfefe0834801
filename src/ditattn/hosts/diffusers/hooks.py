"""How a denoiser's forward becomes known: a hook on its root, light hooks on its self-attention modules."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, HookFunctionReference, StateManager
from torch import Tensor, nn

from ditattn.hosts.diffusers.driver import driving_scheduler
from ditattn.hosts.diffusers.parallel import attend_in_parallel, check_timesteps, sequence_split, tensor_split
from ditattn.models import unwrapped
from ditattn.runtime.attend import attend
from ditattn.runtime.foreign_modes import OwnMode
from ditattn.runtime.forward import running
from ditattn.runtime.served_model import ServedModel
from ditattn.runtime.split import SequenceSplit, TensorSplit
from ditattn.runtime.stage import DenoisingStage

__all__ = [
    "add_layer_hooks",
    "add_root_hook",
    "bind_arguments",
    "enter_layer",
    "is_listening",
    "leave_layer",
    "redirect_forward",
    "redirect_sdpa",
    "why_no_dry_run",
]

HOOK_NAME = "ditattn"


def bind_arguments(signature: inspect.Signature, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A forward's arguments by name, also those that a `**kwargs` of its signature collects."""
    arguments = dict(signature.bind_partial(module, *args, **kwargs).arguments)
    collecting = next((name for name, one in signature.parameters.items() if one.kind is inspect.Parameter.VAR_KEYWORD), None)
    return arguments if collecting is None else {**arguments, **arguments.get(collecting, {})}


class _NoState(BaseState):
    def reset(self) -> None:
        """Nothing to forget."""


class _Pushed(threading.local):
    """Threads that run one model are in different branches."""

    context: Any = None


class _ContextSink(StateManager):
    """Receives `cache_context()`: a string up to diffusers 0.40, an object with the step index from 0.41 on."""

    def __init__(self) -> None:
        super().__init__(_NoState)
        self._of_thread = _Pushed()

    @property
    def pushed(self) -> Any:
        """The context of this thread."""
        return self._of_thread.context

    @property
    def branch(self) -> str | None:
        """Name of the CFG branch."""
        return self.pushed if self.pushed is None or isinstance(self.pushed, str) else self.pushed.name

    def set_context(self, context: Any) -> None:
        self._of_thread.context = context

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self._of_thread.context = None


class _ContextHook(ModelHook):
    """Only listens, to `cache_context()` and to the reset at the end of a pipeline call, which is why it is stateful."""

    _is_stateful = True

    def __init__(self, stage: DenoisingStage) -> None:
        super().__init__()
        self._stage = stage
        self.sink = _ContextSink()

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.sink.reset()
        self._stage.end_run(_runner(module))
        return module


def is_listening(module: nn.Module) -> bool:
    """True if an installation serves this denoiser."""
    return HOOK_NAME in getattr(getattr(module, "_diffusers_hook", None), "hooks", {})


def why_no_dry_run(module: nn.Module) -> str | None:
    """Why the forward of a denoiser must not run beside the pipeline's own calls: hooks of others that remember their calls. Else None."""
    for part in module.modules():
        hooks = getattr(getattr(part, "_diffusers_hook", None), "hooks", {})
        stateful = [name for name, hook in hooks.items() if name != HOOK_NAME and getattr(hook, "_is_stateful", False)]
        if stateful:
            return f"its hook {stateful[0]} remembers calls, which a dry run would be one of"
    return None


def _listen(module: nn.Module, hook: _ContextHook) -> Callable[[], None]:
    """Enter `hook` into the module's registry without the wrapper around `forward` that register_hook() makes.

    Offloading takes wrappers off and puts its own back on after every pipeline call; ours would be lost in between. It is entered as the
    innermost hook, so that the removal of any other one leaves it alone.
    """
    had_registry = hasattr(module, "_diffusers_hook")
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.hooks[HOOK_NAME] = hook
    registry._hook_order.insert(0, HOOK_NAME)
    registry._fn_refs.insert(0, HookFunctionReference())

    def remove() -> None:
        position = registry._hook_order.index(HOOK_NAME)
        registry._hook_order.pop(position)
        registry._fn_refs.pop(position)
        del registry.hooks[HOOK_NAME]
        if not had_registry and not registry.hooks:
            del module._diffusers_hook

    return remove


def _runner(module: nn.Module, scheduler: Any = None) -> object:
    """Whose run goes on: that of the pipeline on the call stack, which its scheduler stands for, or of a loop in this thread."""
    scheduler = driving_scheduler(module) if scheduler is None else scheduler
    return threading.current_thread() if scheduler is None else scheduler


class _RootHooks:
    """Torch's own hooks on a denoiser, around whatever its `forward` is at the time."""

    def __init__(self, module: nn.Module, stage: DenoisingStage, model: ServedModel, sink: _ContextSink) -> None:
        self._stage, self._model, self._sink = stage, model, sink
        self._signature = inspect.signature(type(module).forward)

    @torch.compiler.disable
    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward begins."""
        arguments = bind_arguments(self._signature, module, args, kwargs)
        split: SequenceSplit | TensorSplit | None = sequence_split(module)
        if split is not None:
            check_timesteps(module, arguments)
        elif self._model.layers:
            split = tensor_split(module, unwrapped(module).get_submodule(self._model.layers[0]))
        scheduler = driving_scheduler(module)
        context, branch = self._sink.pushed, self._sink.branch
        self._stage.enter(self._model, arguments, context, branch, scheduler, split, runner=_runner(module, scheduler))

    @torch.compiler.disable
    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """The forward ended, with or without an exception."""
        forward = running()
        if forward is not None and forward.model is self._model:
            self._stage.leave(forward)
        if output is None:
            # it raised, and no pipeline goes on after that
            self._stage.end_run(_runner(module))


def add_root_hook(module: nn.Module, stage: DenoisingStage, model: ServedModel) -> Callable[[], None]:
    """Publish every forward of `module`. Returns the removal, which leaves the module exactly as it was."""
    context_hook = _ContextHook(stage)
    root = _RootHooks(module, stage, model, context_hook.sink)
    removals = [
        _listen(module, context_hook),
        module.register_forward_pre_hook(root.begin, with_kwargs=True).remove,
        module.register_forward_hook(root.end, always_call=True).remove,
        stage.reset,
    ]

    def remove() -> None:
        for undo in removals:
            undo()

    return remove


class _SdpaRedirect(OwnMode):
    """Torch's SDPA, which has `[B, H, S, D]`, comes to us; `parallel_config` is diffusers' where tokens are split between ranks."""

    def __init__(self, parallel_config: Any) -> None:
        super().__init__()
        self._attend = _attend_bhsd if parallel_config is None else functools.partial(_attend_bhsd, parallel_config=parallel_config)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        # torch takes the mode off while it runs, so that the SDPA call of our own kernel does not come back here
        run = self._attend if func is nn.functional.scaled_dot_product_attention else func
        if func is Tensor.unflatten:
            # the method is Python that calls super(), which torch.compile cannot trace from here; the function is the same
            run = torch.unflatten
        return run(*args, **(kwargs or {}))


def redirect_sdpa(processor: Any) -> Any:
    """A copy of an attention processor that calls torch's SDPA itself, whose calls come to us. It also compiles.

    Raises:
        TypeError: Python lets nobody derive such an object: a function, or a class with slots.
    """
    cls = type(processor)
    if cls not in _redirected_classes:
        _redirected_classes[cls] = _redirected(cls)
    twin = copy.copy(processor)
    twin.__class__ = _redirected_classes[cls]
    return twin


# one for all objects of a class, since torch.compile makes a graph for each class it meets
_redirected_classes: dict[type, Any] = {}


def _redirected(cls: Any) -> Any:
    """A processor class whose calls of SDPA come to us."""

    class Redirected(cls):
        # diffusers' enable_parallelism sets it, as it does on processors that go through its dispatcher
        _parallel_config: Any = None

        # the attention module reads the signature to know which arguments to pass
        @functools.wraps(cls.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with _SdpaRedirect(self._parallel_config):
                return cls.__call__(self, *args, **kwargs)

    return Redirected


def redirect_forward(part: nn.Module) -> Callable[[], None]:
    """Let the SDPA calls of an attention module without a processor come to us. Returns the removal."""
    forward, own = part.forward, "forward" in vars(part)

    @functools.wraps(forward)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        with _SdpaRedirect(None):
            return forward(*args, **kwargs)

    # copies of the part go without it
    redirected.ditattn_redirects = True  # type: ignore[attr-defined]
    vars(part)["forward"] = redirected

    def remove() -> None:
        if own:
            vars(part)["forward"] = forward
        else:
            vars(part).pop("forward", None)

    return remove


def _attend_bhsd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    parallel_config: Any = None,
) -> Tensor:
    """`attend` behind the signature and layout of torch's SDPA, between the exchanges of ranks where tokens are split."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if parallel_config is not None:
        return attend_in_parallel(q, k, v, attn_mask, dropout_p, is_causal, scale, parallel_config).transpose(1, 2)
    return attend(q, k, v, attn_mask, dropout_p, is_causal, scale).transpose(1, 2)


def enter_layer(layer: int | None, hidden_states: Any = None) -> None:
    """Self-attention layer number `layer` begins, with its input where that is known; None for a module that is not served."""
    # a compiled graph runs no Python here: there the layer is counted inside the operation
    if torch.compiler.is_compiling():
        return
    forward = running()
    if forward is not None:
        forward.layer = layer
        forward.layer_batch = hidden_states.shape[0] if isinstance(hidden_states, Tensor) else None


def leave_layer() -> None:
    """The attention module ended."""
    enter_layer(None)


def add_layer_hooks(layers: Mapping[int, nn.Module]) -> Callable[[], None]:
    """Tell the running forward which layer runs; `layers` by number. Returns the removal."""
    handles = []
    for number, module in layers.items():

        def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int = number) -> None:
            enter_layer(number, args[0] if args else kwargs.get("hidden_states"))

        def end(_module: nn.Module, _args: Any, _output: Any) -> None:
            leave_layer()

        handles += [module.register_forward_pre_hook(begin, with_kwargs=True), module.register_forward_hook(end)]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove
