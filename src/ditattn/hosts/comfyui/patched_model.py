"""A handle's override and wrappers, put on a clone of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ditattn.backends.registry import RECOMMENDED_BACKEND, usable_backends
from ditattn.backends.setting import Setting
from ditattn.backends.sparse import SparseAttentionImpl
from ditattn.devices import find_device
from ditattn.errors import BackendUnavailable, ConfigError, UnsupportedModel
from ditattn.hosts.comfyui.call import Call
from ditattn.hosts.comfyui.handle import Handle
from ditattn.hosts.comfyui.widgets import backend_choices
from ditattn.runtime.forward import running

__all__ = ["attach"]

OVERRIDE = "optimized_attention_override"
# ComfyUI's names of the places where wrappers go
AROUND_SAMPLING, AROUND_FORWARD = "outer_sample", "diffusion_model"
WRAPPER_KEY = "ditattn"


def attach(model: Any, backend: str = RECOMMENDED_BACKEND, keys: Mapping[str, Any] | None = None) -> tuple[Any, Handle]:
    """A clone of a ComfyUI MODEL whose diffusion model attends by a sparse backend of ours, and its handle. `model` stays as it was.

    Dense calls go to ComfyUI's own attention, or to that of a node before this one (SageAttention, say). A second `attach` replaces the
    first.

    Args:
        model: a ModelPatcher.
        backend: name of a sparse backend.
        keys: of its configuration.

    Raises:
        UnknownBackend, ConfigError: as `ditattn.install`, and ConfigError for a backend that is not sparse.
        BackendUnavailable: it cannot run on the model's device.
        UnsupportedModel: an object that has no wrappers: ComfyUI is older than they are.
    """
    setting = Setting.parse(backend, keys)
    made = next(one for one in usable_backends() if one.name == setting.backend)
    if not issubclass(made.get_impl_cls(), SparseAttentionImpl):
        raise ConfigError(f"'{made.name}' is not sparse, and ComfyUI has dense attention of its own: take {', '.join(backend_choices())}")
    if not hasattr(model, "add_wrapper_with_key"):
        raise UnsupportedModel(f"{type(model).__name__} has no add_wrapper_with_key: update ComfyUI")
    device = find_device(model.load_device)
    reason = made.why_not(device)
    if reason is not None:
        raise BackendUnavailable(f"'{made.name}' was asked for on {device.device_type}: {reason}")
    handle = Handle(setting, made)
    patched = model.clone()
    options = patched.model_options.get("transformer_options", {})
    before = options.get(OVERRIDE)
    override = _override(handle, getattr(before, "before_ditattn", before))
    patched.model_options = {**patched.model_options, "transformer_options": {**options, OVERRIDE: override}}
    for place, wrapper in ((AROUND_SAMPLING, _around_sampling(handle)), (AROUND_FORWARD, _around_forward(handle))):
        patched.remove_wrappers_with_key(place, WRAPPER_KEY)
        patched.add_wrapper_with_key(place, WRAPPER_KEY, wrapper)
    return patched, handle


# functions, not objects: cloning a model copies its options deeply, and a copied handle would count for nobody


def _override(handle: Handle, before: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    # what it does depends on the step and on counts, which compiled code would keep
    @torch.compiler.disable
    def override(
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **more: Any,
    ) -> Tensor:
        function = func if before is None else lambda *args, **kwargs: before(func, *args, **kwargs)
        call = Call(function, q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, more)
        forward = running()
        if forward is None or forward.stage is not handle.stage:
            return call.native()
        return handle.attend(forward, call)

    override.before_ditattn = before
    return override


def _around_sampling(handle: Handle) -> Callable[..., Any]:
    def around_sampling(executor: Any, *args: Any, **kwargs: Any) -> Any:
        handle.begin()
        try:
            return executor(*args, **kwargs)
        finally:
            handle.end()

    return around_sampling


def _around_forward(handle: Handle) -> Callable[..., Any]:
    @torch.compiler.disable(recursive=False)
    def around_forward(executor: Any, *args: Any, **kwargs: Any) -> Any:
        forward = handle.enter(executor.class_obj, _by_name(executor.original, args, kwargs))
        if forward is None:
            return executor(*args, **kwargs)
        try:
            return executor(*args, **kwargs)
        finally:
            handle.stage.leave(forward)

    return around_forward


def _by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, those among them that the function takes without declaring them."""
    signature = inspect.signature(function)
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given
