"""register: make our names selectable through diffusers' own `set_attention_backend`.

That call carries no configuration, knows no step and reaches every attention module, cross-attention included. So `register` takes the
configuration, and while it lasts it watches module calls through torch's global module hooks to learn which denoiser and which layer runs;
the step comes from changes of the timestep. `install` needs none of that and is the better road where there is a choice: it knows the
scheduler, leaves cross-attention and the process-wide backend alone, serves models that bypass the dispatcher, and works compiled.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from ditattn.backends.registry import backend_names, load_backend, usable_backends
from ditattn.backends.setting import Setting
from ditattn.errors import ConfigError, UnsupportedModel
from ditattn.hosts.diffusers.dispatcher import add_public_backend
from ditattn.hosts.diffusers.hooks import bind_arguments, enter_layer, leave_layer
from ditattn.hosts.diffusers.install import self_attention_modules, serve
from ditattn.models import family_of
from ditattn.runtime.report import AttentionReport
from ditattn.runtime.stage import DenoisingStage, Forward, ServedModel, running
from ditattn.runtime.step import StepClock

__all__ = ["Registration", "register"]

_active: list[Registration] = []


def register(*, strict: bool = False, **config: Any) -> Registration:
    """Add our backend names to diffusers, so that `transformer.set_attention_backend("rain_fusion_attn")` works.

    Args:
        strict: as in `install`.
        config: keys of the sparse backends' configuration, for every denoiser that chooses one; dense backends have none.

    Returns:
        A handle with `report()` and `remove()`; also a context manager.

    Raises:
        UnsupportedModel: registered already.
        UnknownKey, ConfigError: no sparse backend takes the configuration.
    """
    _check(config)
    if _active:
        raise UnsupportedModel("the names are registered already: remove() that registration first")
    return Registration(config, strict)


def _check(config: Mapping[str, Any]) -> None:
    """Raise unless some sparse backend takes the configuration; which one will be chosen is not known yet."""
    refusal: ConfigError | None = None
    for backend in filter(lambda backend: backend.is_sparse, usable_backends()):
        try:
            Setting.parse(backend.name, config)
            return
        except ConfigError as error:
            refusal = error
    assert refusal is not None
    raise refusal


@dataclass
class _Denoiser:
    """A denoiser that chose one of our names."""

    module: nn.Module
    stage: DenoisingStage
    served: ServedModel
    signature: inspect.Signature
    layer_of: WeakIdKeyDictionary
    forward: Forward | None = None


class Registration:
    """What `register` returns."""

    def __init__(self, config: Mapping[str, Any], strict: bool) -> None:
        self._config, self._strict = dict(config), strict
        self._denoisers = WeakIdKeyDictionary()
        self._layers = WeakIdKeyDictionary()
        self._running: list[_Denoiser] = []
        self._names = set(backend_names())
        self._undo = contextlib.ExitStack()
        for name in sorted(self._names):
            self._undo.callback(add_public_backend(name))
        # torch hands keyword arguments to a global hook only for modules that list the hook's id, so one hook lists the other first
        self._undo.callback(register_module_forward_pre_hook(self._notice).remove)
        self._enter_hook = register_module_forward_pre_hook(self._enter)
        self._undo.callback(self._enter_hook.remove)
        self._undo.callback(register_module_forward_hook(self._leave, always_call=True).remove)
        _active.append(self)

    def report(self) -> AttentionReport:
        """What ran so far in all denoisers that chose one of our names."""
        reports = [denoiser.stage.report() for per_name in self._denoisers.values() for denoiser in per_name.values()]
        components: dict[str, Any] = {}
        for report in reports:
            for name, part in report.components.items():
                components[name if name not in components else f"{name} {len(components) + 1}"] = part
        return AttentionReport(components, {})

    def remove(self) -> None:
        """Take the names out of diffusers again. Call `reset_attention_backend()` on models that still use one, or they cannot run."""
        self._undo.close()
        for module, per_name in list(self._denoisers.items()):
            for denoiser in per_name.values():
                denoiser.stage.reset()
            module._forward_pre_hooks_with_kwargs.pop(self._enter_hook.id, None)
        if self in _active:
            _active.remove(self)

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _notice(self, module: nn.Module, args: Any) -> None:
        """First global hook: a denoiser that uses one of our names is about to run."""
        if torch.compiler.is_compiling() or family_of(module) is None:
            return
        name = self._chosen_name(module)
        if name is None:
            module._forward_pre_hooks_with_kwargs.pop(self._enter_hook.id, None)
            return
        per_name = self._denoisers.setdefault(module, {})
        if name not in per_name:
            per_name[name] = self._meet(module, name)
        module._forward_pre_hooks_with_kwargs[self._enter_hook.id] = True

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Second global hook: with kwargs for denoisers, without for every other module."""
        if torch.compiler.is_compiling():
            return
        if kwargs is not None:
            name = self._chosen_name(module)
            assert name is not None
            denoiser: _Denoiser = self._denoisers[module][name]
            denoiser.forward = denoiser.stage.enter(denoiser.served, bind_arguments(denoiser.signature, module, args, kwargs))
            # a forward that KeyboardInterrupt ended was not left
            self._running = [*(other for other in self._running if other.module is not module), denoiser]
        elif self._running and running() is self._running[-1].forward and hasattr(module, "processor"):
            enter_layer(self._running[-1].layer_of.get(module))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self._running:
            return
        denoiser = self._running[-1]
        if module is denoiser.module:
            self._running.pop()
            if denoiser.forward is not None:
                denoiser.stage.leave(denoiser.forward)
        elif hasattr(module, "processor"):
            leave_layer()

    def _chosen_name(self, module: nn.Module) -> str | None:
        """Which of our names the denoiser's self-attention uses, or None."""
        family = family_of(module)
        assert family is not None
        parts = self._layers.get(module)
        if parts is None:
            parts = self._layers[module] = list(self_attention_modules(module, family).values())
        chosen = getattr(parts[0].processor, "_attention_backend", None) if parts else None
        return str(chosen.value) if chosen is not None and chosen.value in self._names else None

    def _meet(self, module: nn.Module, name: str) -> _Denoiser:
        family = family_of(module)
        assert family is not None
        stage = DenoisingStage(StepClock(), self._strict)
        keys = self._config if load_backend(name).is_sparse else {}
        served = serve(module, type(module).__name__, family, Setting.parse(name, keys))
        served.layers_by_count = False
        stage.models.append(served)
        layer_of = WeakIdKeyDictionary({part: number for number, part in enumerate(self._layers[module])})
        return _Denoiser(module, stage, served, inspect.signature(type(module).forward), layer_of)
