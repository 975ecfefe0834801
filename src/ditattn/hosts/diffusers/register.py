"""register: make our names selectable through diffusers' own `set_attention_backend`.

That call carries no configuration, knows no step and reaches every attention module that goes through diffusers' dispatcher,
cross-attention included. So `register` takes the configuration, and while it lasts it watches module calls through torch's global module
hooks to learn which denoiser and which layer runs; the step comes from changes of the timestep. A denoiser of no family is served by rule,
as by `install`. `install` needs none of that and is the better road where there is a choice: it knows the scheduler, leaves cross-attention
and the process-wide backend alone, serves models that bypass the dispatcher, and works compiled.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from ditattn.arguments import described
from ditattn.backends.registry import backend_names, load_backend, usable_backends
from ditattn.backends.setting import Setting
from ditattn.errors import ConfigError, UnsupportedModel
from ditattn.hosts.diffusers.choices import keep_choices
from ditattn.hosts.diffusers.dispatcher import add_public_backend, process_wide_backend
from ditattn.hosts.diffusers.hooks import bind_arguments, enter_layer, leave_layer
from ditattn.hosts.diffusers.install import family_or_reason, self_attention_modules, serve
from ditattn.hosts.diffusers.parallel import sequence_split
from ditattn.models import ModelFamily, family_of
from ditattn.runtime.forward import Forward, running
from ditattn.runtime.report import AttentionReport
from ditattn.runtime.stage import DenoisingStage
from ditattn.runtime.step import StepClock

__all__ = ["Registration", "register"]

logger = logging.getLogger("ditattn")

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
        UnknownKey, ConfigError: no sparse backend takes the configuration, or `strict` is neither True nor False.

    Examples:
        >>> import ditattn
        >>> from diffusers import DiffusionPipeline
        >>> pipe = DiffusionPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
        >>> with ditattn.register(sparsity=0.75, skip_first_steps=1) as handle:
        ...     pipe.transformer.set_attention_backend("rain_fusion_attn")
        ...     frames = pipe(prompt="a cat walks on the grass", num_inference_steps=50).frames[0]
        >>> print(handle.report().summary())  # doctest: +ELLIPSIS
        attention (...): rain_fusion_attn: ... sparse at density 0... dense (...
    """
    if not isinstance(strict, bool):
        raise ConfigError(f"strict must be True or False, not {described(strict)}")
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
    """A denoiser of which some layer chose one of our names. The names share its clock."""

    signature: inspect.Signature
    layer_of: WeakIdKeyDictionary
    clock: StepClock = field(default_factory=StepClock)
    stages: dict[str, DenoisingStage] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    forwards: dict[str, Forward] = field(default_factory=dict)


class Registration:
    """What `register` returns."""

    def __init__(self, config: Mapping[str, Any], strict: bool) -> None:
        # takes seconds
        from diffusers import ModelMixin

        self._config, self._strict, self._model_class = dict(config), strict, ModelMixin
        self._denoisers = WeakIdKeyDictionary()
        self._layers = WeakIdKeyDictionary()
        self._unlisted = WeakIdKeyDictionary()
        self._looked_at = WeakIdKeyDictionary()
        self._not_served: dict[str, str] = {}
        self._running: list[tuple[nn.Module, _Denoiser]] = []
        self._names = set(backend_names())
        self._undo = contextlib.ExitStack()
        self._undo.callback(keep_choices(self._names))
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
        reports = [stage.report() for denoiser in self._denoisers.values() for stage in denoiser.stages.values()]
        components: dict[str, Any] = {}
        for report in reports:
            for name, part in report.components.items():
                components[name if name not in components else f"{name} {len(components) + 1}"] = part
        return AttentionReport(components, dict(self._not_served))

    def remove(self) -> None:
        """Take the names out of diffusers again. Modules that still name one get back what they had when the names were registered."""
        self._undo.close()
        for module, denoiser in list(self._denoisers.items()):
            for stage in denoiser.stages.values():
                stage.reset()
            module._forward_pre_hooks_with_kwargs.pop(self._enter_hook.id, None)
        if self in _active:
            _active.remove(self)

    def __enter__(self) -> Registration:
        if self not in _active:
            raise ConfigError("this registration was removed, so no name would be known in this block: call register again")
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _notice(self, module: nn.Module, args: Any) -> None:
        """First global hook: a denoiser that uses one of our names is about to run."""
        if torch.compiler.is_compiling() or (family := self._family(module)) is None:
            return
        names = self._chosen_names(module, family)
        if not names:
            module._forward_pre_hooks_with_kwargs.pop(self._enter_hook.id, None)
            return
        if module not in self._denoisers:
            layer_of = WeakIdKeyDictionary({part: number for number, part in enumerate(self._layers[module])})
            self._denoisers[module] = _Denoiser(inspect.signature(type(module).forward), layer_of)
        denoiser: _Denoiser = self._denoisers[module]
        denoiser.names = names
        for name in names:
            if name not in denoiser.stages:
                denoiser.stages[name] = self._stage(module, name, denoiser.clock)
        module._forward_pre_hooks_with_kwargs[self._enter_hook.id] = True

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Second global hook: with kwargs for denoisers, without for every other module."""
        if torch.compiler.is_compiling():
            return
        if kwargs is not None:
            denoiser: _Denoiser = self._denoisers[module]
            # a forward that KeyboardInterrupt ended was not left. Dry runs of this one begin before its own
            self._running = [*((other, its) for other, its in self._running if other is not module), (module, denoiser)]
            arguments = bind_arguments(denoiser.signature, module, args, kwargs)
            stages = {name: denoiser.stages[name] for name in denoiser.names}
            denoiser.forwards = {
                name: stage.enter(stage.models[0], arguments, split=sequence_split(module)) for name, stage in stages.items()
            }
        elif self._running and hasattr(module, "processor"):
            self._enter_layer(self._running[-1][1], module)

    def _enter_layer(self, denoiser: _Denoiser, module: nn.Module) -> None:
        """An attention module begins: what was chosen for it is what runs."""
        current = running()
        if current is not None and current.look is not None:
            enter_layer(denoiser.layer_of.get(module))
            return
        if not any(forward is current for forward in denoiser.forwards.values()):
            return
        forward = denoiser.forwards.get(self._chosen_name(module) or "")
        if forward is not None:
            forward.stage.resume(forward)
        enter_layer(None if forward is None else denoiser.layer_of.get(module))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self._running:
            return
        denoiser_module, denoiser = self._running[-1]
        if module is denoiser_module:
            self._running.pop()
            for forward in denoiser.forwards.values():
                forward.stage.leave(forward)
            denoiser.forwards = {}
        elif hasattr(module, "processor"):
            leave_layer()

    def _family(self, module: nn.Module) -> ModelFamily | None:
        """The family of a denoiser, by rule where nobody described it; None for every other module.

        Raises:
            UnsupportedModel: strict, and it is of no family.
        """
        family = family_of(module)
        if family is not None or not isinstance(module, self._model_class):
            return family
        if module not in self._unlisted:
            if any(module is part for denoiser, _ in self._running for part in denoiser.modules()):
                return None
            if not self._any_chosen(module):
                self._tell_if_unreached(module)
                return None
            found = family_or_reason(type(module).__name__, module, self._strict, "runs densely, by torch's SDPA")
            if isinstance(found, str):
                self._leave_alone(module, found)
            self._unlisted[module] = None if isinstance(found, str) else found
        by_rule: ModelFamily | None = self._unlisted[module]
        return by_rule

    def _any_chosen(self, module: nn.Module) -> bool:
        return any(self._chosen_name(part) is not None for part in module.modules() if hasattr(part, "processor"))

    def _leave_alone(self, module: nn.Module, reason: str) -> None:
        """Say once why a model is not served."""
        name = type(module).__name__
        if name not in self._not_served:
            logger.warning("%s: %s", name, reason)
            self._not_served[name] = reason

    def _chosen_name(self, module: nn.Module) -> str | None:
        """Which of our names an attention module uses, or None."""
        chosen = getattr(getattr(module, "processor", None), "_attention_backend", None)
        return str(chosen.value) if chosen is not None and chosen.value in self._names else None

    def _chosen_names(self, module: nn.Module, family: ModelFamily) -> list[str]:
        """Which of our names the denoiser's self-attention uses, in the order of the layers."""
        parts = self._layers.get(module)
        if parts is None:
            parts = self._layers[module] = list(self_attention_modules(module, family).values())
        names = list(dict.fromkeys(name for part in parts if (name := self._chosen_name(part)) is not None))
        if not names and not family.dispatches:
            self._tell_if_unreached(module)
        return names

    def _tell_if_unreached(self, module: nn.Module) -> None:
        """Say so if one of our names was asked for, and a denoiser calls torch's SDPA itself."""
        if module in self._looked_at or process_wide_backend() not in self._names:
            return
        self._looked_at[module] = True
        name = type(module).__name__
        family = family_of(module) or family_or_reason(name, module, strict=False)
        if not isinstance(family, str) and not family.dispatches:
            what = f"{name} calls torch's SDPA itself, which set_attention_backend does not reach, so its attention stays as it was"
            self._leave_alone(module, f"{what}; ditattn.install serves it")

    def _stage(self, module: nn.Module, name: str, clock: StepClock) -> DenoisingStage:
        """What serves the layers of a denoiser that chose this name."""
        # where tokens stand is seen for each of the names that a denoiser of no family chose
        family = family_or_reason(type(module).__name__, module, self._strict)
        assert not isinstance(family, str)
        stage = DenoisingStage(clock, self._strict)
        keys = self._config if load_backend(name).is_sparse else {}
        served = serve(module, type(module).__name__, family, Setting.parse(name, keys))
        served.layers_by_count = False
        stage.models.append(served)
        return stage
