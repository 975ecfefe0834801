"""install: serve the self-attention of a pipeline's denoisers, and undo it."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ditattn.arguments import described
from ditattn.backends.selector import get_attn_backend
from ditattn.backends.setting import Setting, StepCache, split_step_cache
from ditattn.errors import ConfigError, UnsupportedModel
from ditattn.hosts.diffusers.copies import copies_are_plain
from ditattn.hosts.diffusers.dispatcher import add_private_backend
from ditattn.hosts.diffusers.execution import execution_device
from ditattn.hosts.diffusers.hooks import add_layer_hooks, add_root_hook, is_listening, redirect_forward, redirect_sdpa, why_no_dry_run
from ditattn.hosts.diffusers.parallel import check_split, sequence_split
from ditattn.models import MODELS, ModelFamily, family_of, known_class, unwrapped, why_not_served
from ditattn.models.unlisted import BY_RULE, family_by_rule
from ditattn.runtime.layout_by_rule import LayoutByRule
from ditattn.runtime.metadata import check_layers
from ditattn.runtime.probe import Probe
from ditattn.runtime.report import AttentionReport
from ditattn.runtime.served_model import ServedModel
from ditattn.runtime.stage import DenoisingStage
from ditattn.runtime.step import StepClock

__all__ = ["Installation", "denoisers", "family_or_reason", "install", "install_setting", "names_denoiser", "self_attention_modules"]

logger = logging.getLogger("ditattn")


class Installation:
    """What `install` returns: a handle and a context manager.

    Leaving it, or calling `remove`, restores the very same objects; the report stays readable.
    """

    def __init__(self, stage: DenoisingStage) -> None:
        self._stage = stage
        self._undo = contextlib.ExitStack()
        self._removed = False

    def report(self) -> AttentionReport:
        """What ran so far: calls, reasons, densities, time."""
        return self._stage.report()

    def overall_densities(self) -> dict[str, list[tuple[int, int, float]]]:
        """(step, layer, overall density) of every component: a dense call counts as 1."""
        return {model.name: model.log.overall_densities() for model in self._stage.models}

    def head_orders(self) -> dict[str, dict[int, list[str]]]:
        """By component and layer, the order of tokens that each key head chose most often, where heads choose (`permuted_sparse_attn`)."""
        return {model.name: orders for model in self._stage.models if (orders := model.log.head_orders())}

    def watch(self, probe: Probe) -> None:
        """Let `probe` see every served call."""
        self._stage.probe = probe

    def remove(self) -> None:
        """Restore the pipeline. Calling it twice does nothing."""
        self._removed = True
        self._undo.close()
        self._stage.reset()

    def on_remove(self, function: Callable[[], None]) -> None:
        """Undo steps run in reverse order."""
        self._undo.callback(function)

    def __enter__(self) -> Installation:
        if self._removed:
            raise ConfigError("this installation was removed, so nothing would be served in this block: call install again")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def install(
    target: Any,
    backend: str | None = None,
    *,
    components: Mapping[str, str | None] | None = None,
    strict: bool = False,
    **config: Any,
) -> Installation:
    """Serve the self-attention of every denoiser of a pipeline.

    Cross-attention, text encoders and other models stay as they were, and so does diffusers' process-wide backend.

    Args:
        target: a diffusers pipeline (preferred: it knows the step), or a bare transformer.
        backend: a backend's name or a member of `AttentionBackendEnum`; None takes DITATTN_ATTENTION_BACKEND or torch_sdpa.
        components: other backends for single components, such as {"transformer_2": "torch_sdpa"}. `config` belongs to `backend` (without
            one, to the backend that the components name); a component with a different backend runs with that one's defaults.
        strict: raise DenseInStrictMode if a call falls back to dense attention for a reason that no setting asks for, and for a run that
            would be dense from end to end (no step after the dense first ones, short sequences, sparsity 0), and UnsupportedModel for a
            model that is not known.
        config: keys of the backend's configuration, such as sparsity=0.5. With `step_cache` among them, as `tune --cache` writes it, a
            warning says where no step cache is on; nothing is switched on.

    Returns:
        A handle with `report()` and `remove()`; also a context manager.

    Raises:
        UnknownBackend, UnsupportedHeadSize, BackendUnavailable: the backend cannot serve this model on this machine.
        UnknownKey, ConfigError: a configuration key or value.
        UnsupportedModel: already installed, no denoiser found, it is split between ranks in a way that is not served, the family does not
            support the backend, or (strict) the family is unknown or a layer has an attention processor that cannot be served.

    Examples:
        >>> import ditattn
        >>> from diffusers import DiffusionPipeline
        >>> pipe = DiffusionPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
        >>> with ditattn.install(pipe, "permuted_sparse_attn", sparsity=0.75) as handle:
        ...     frames = pipe(prompt="a cat walks on the grass", num_inference_steps=50).frames[0]
        >>> print(handle.report().summary())  # doctest: +ELLIPSIS
        attention (transformer): permuted_sparse_attn: ... sparse at density 0.2... dense (first steps: ...); ... s in attention
    """
    keys, step_cache = split_step_cache(config)
    return install_setting(target, replace(Setting.parse(backend, keys, components), step_cache=step_cache), strict=strict)


def install_setting(target: Any, setting: Setting, *, strict: bool = False) -> Installation:
    """`install` of what was parsed before. Raises as `install`, but for what `Setting.parse` has checked."""
    if not isinstance(strict, bool):
        raise ConfigError(f"strict must be True or False, not {described(strict)}")
    models = denoisers(target)
    if not models:
        raise UnsupportedModel(
            f"{type(target).__name__} has no component named transformer*; it has {', '.join(_components(target)) or 'none'}"
        )
    unknown = sorted(set(setting.components) - set(models))
    if unknown:
        raise UnsupportedModel(f"no denoiser named {', '.join(unknown)}; there is {', '.join(models)}")
    if setting.step_cache is not None:
        _warn_without_step_cache(models, setting.step_cache)
    stage = DenoisingStage(StepClock(None if isinstance(target, nn.Module) else lambda: getattr(target, "scheduler", None)), strict)
    handle = Installation(stage)
    try:
        for name, module in models.items():
            _install_one(handle, stage, name, module, setting)
    except BaseException:
        handle.remove()
        raise
    return handle


def _warn_without_step_cache(models: Mapping[str, nn.Module], step_cache: StepCache) -> None:
    """Which one is on, and with which keys, is not looked at: that is the caller's."""
    if without := [name for name, module in models.items() if not getattr(unwrapped(module), "is_cache_enabled", False)]:
        logger.warning(
            "%s: the keys were tuned beside the step cache %s, and none is on: clips and times will differ from what was measured; "
            "enable_cache of the model switches it on, before or after install",
            ", ".join(without),
            step_cache.words,
        )


def denoisers(target: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline by name, or the one given, under its class name."""
    if isinstance(target, nn.Module):
        return {type(unwrapped(target)).__name__: target}
    parts = _components(target)
    return {name: part for name, part in parts.items() if names_denoiser(name) and isinstance(part, nn.Module)}


def names_denoiser(component: str) -> bool:
    """What diffusers' pipelines call their denoisers; an `unconditional_transformer` makes the pass without text."""
    return component.startswith(("transformer", "unconditional_transformer"))


def self_attention_modules(module: nn.Module, family: ModelFamily) -> dict[str, nn.Module]:
    """Self-attention modules by path, in the order of the layers."""
    parts = {path: part for path, part in module.named_modules() if family.is_self_attention(path)}
    return {path: part for path, part in parts.items() if hasattr(part, "processor") or not family.has_processors}


def serve(module: Any, name: str, family: ModelFamily, setting: Setting) -> ServedModel:
    """Choose the backend of one denoiser, and its configuration."""
    parameter = next(module.parameters())
    chosen = get_attn_backend(
        family.head_size(getattr(module, "config", None)),
        parameter.dtype if parameter.dtype in (torch.float32, torch.float16) else torch.bfloat16,
        device=execution_device(module),
        component=name,
        component_backends=setting.components,
        pipeline_backend=setting.backend,
        supported=family.supported,
        model=family.name,
    )
    layers = list(self_attention_modules(module, family))
    served = ServedModel(name, family, getattr(module, "config", None), chosen, setting.config_of(chosen), layers)
    served.log.model = _described(module)
    if isinstance(family.layout, LayoutByRule):
        family.layout.model = served
        served.log.model = f"{type(module).__name__}, {BY_RULE}"
    check_layers(served.config, len(layers), name)
    return served


def _install_one(
    handle: Installation,
    stage: DenoisingStage,
    name: str,
    module: nn.Module,
    setting: Setting,
) -> None:
    module = unwrapped(module)
    family = family_or_reason(name, module, stage.strict)
    if isinstance(family, str):
        _leave_alone(stage, name, family)
        return
    if is_listening(module):
        raise UnsupportedModel(f"{name} is served by another installation: remove() that one first")
    modules = self_attention_modules(module, family)
    check_split(name, module, family)
    served = serve(module, name, family, setting)
    refused = {path: reason for path, part in modules.items() if (reason := _why_not_served(part, family)) is not None}
    for path, reason in refused.items():
        _leave_alone(stage, f"{name}: {path}", reason)
    if refused and len(refused) == len(modules):
        return
    layers = {number: part for number, (path, part) in enumerate(modules.items()) if path not in refused}
    served.served_layers = family.in_running_order({number: served.layers[number] for number in layers})
    stage.models.append(served)
    handle.on_remove(add_root_hook(module, stage, served))
    handle.on_remove(add_layer_hooks(layers))
    if family.dispatches:
        member, remove_member = add_private_backend(served.backend.name)
        handle.on_remove(remove_member)
        shared = _processors_elsewhere(module, layers.values())
        for part in layers.values():
            plain = part.processor
            if id(plain) in shared:
                handle.on_remove(_replace_processor(part, copy.copy(plain)))
            # before the member is set: a copy of the part gets a processor without it
            handle.on_remove(copies_are_plain(part, partial(copy.copy, copy.copy(plain))))
            handle.on_remove(_set_processor_backend(part.processor, member))
    elif not family.has_processors:
        for part in layers.values():
            handle.on_remove(copies_are_plain(part))
            handle.on_remove(redirect_forward(part))
    else:
        for part in layers.values():
            handle.on_remove(copies_are_plain(part, partial(copy.copy, part.processor)))
            twin = redirect_sdpa(part.processor)
            twin._parallel_config = getattr(module, "_parallel_config", None) if sequence_split(module) is not None else None
            handle.on_remove(_replace_processor(part, twin))
    handle.on_remove(copies_are_plain(module))


def _processors_elsewhere(module: nn.Module, served: Iterable[nn.Module]) -> set[int]:
    """Identities of the processors of the attention modules that are not served: one object may serve several modules."""
    ours = set(map(id, served))
    return {id(part.processor) for part in module.modules() if hasattr(part, "processor") and id(part) not in ours}


def _replace_processor(part: nn.Module, processor: Any) -> Callable[[], None]:
    before = part.processor
    part.processor = processor

    def restore() -> None:
        part.processor = before

    return restore


def _described(module: nn.Module) -> str:
    """The class of a denoiser, and where it is a subclass the known one that it is served as."""
    own, known = type(module).__name__, known_class(module)
    return own if known in (own, None) else f"{own}, served as {known}"


def family_or_reason(name: str, module: nn.Module, strict: bool, otherwise: str = "stays as it was") -> ModelFamily | str:
    """The family of a denoiser, by rule where nobody described it; else why it is not served.

    Args:
        name: of the component.
        module: the denoiser.
        strict: of no family is an error.
        otherwise: what its attention does where it is not served.

    Raises:
        UnsupportedModel: strict, and it is of no family.
    """
    family = family_of(module)
    if family is not None:
        return family
    cls, reason = type(module).__name__, why_not_served(module)
    known = f"(`ditattn models` lists the {sum(len(family.transformer_classes) for family in MODELS)} classes that are known)"
    if reason is not None:
        reason = f"{cls} is not served: {reason}, so its attention {otherwise} {known}"
        if strict:
            raise UnsupportedModel(f"{name}: {reason}")
        return reason
    if strict:
        raise UnsupportedModel(f"{name}: {cls} is not a known model family: without strict it is served by rule {known}")
    try:
        return family_by_rule(module, LayoutByRule(module, partial(why_no_dry_run, module)))
    except ValueError as error:
        return f"{cls} is not a known model family, and {error}, so its attention {otherwise} {known}"


def _why_not_served(part: nn.Module, family: ModelFamily) -> str | None:
    """Why the calls of an attention module cannot come to us, or None."""
    if not family.has_processors:
        return None
    processor: Any = part.processor
    what = f"its processor {getattr(processor, '__qualname__', type(processor).__name__)}"
    if family.dispatches:
        goes_through = hasattr(processor, "_attention_backend") and hasattr(processor, "__dict__")
        return None if goes_through else f"{what} has no attribute _attention_backend, so it does not go through diffusers' dispatcher"
    try:
        redirect_sdpa(processor)
    except TypeError as error:
        return f"{what} cannot be derived from, so its calls of torch's SDPA stay its own ({error})"
    return None


def _leave_alone(stage: DenoisingStage, name: str, reason: str) -> None:
    if stage.strict:
        raise UnsupportedModel(f"{name}: {reason}")
    logger.warning("%s: %s", name, reason)
    stage.not_served[name] = reason


def _set_processor_backend(processor: Any, member: Any) -> Callable[[], None]:
    # the attribute usually lives on the class: restoring means removing ours from the instance
    own = "_attention_backend" in vars(processor)
    before = processor._attention_backend
    processor._attention_backend = member

    def restore() -> None:
        if own:
            processor._attention_backend = before
        else:
            vars(processor).pop("_attention_backend", None)

    return restore


def _components(target: Any) -> dict[str, Any]:
    parts = getattr(target, "components", None)
    if not isinstance(parts, Mapping):
        raise ConfigError(f"install needs a diffusers pipeline or a transformer, not {type(target).__name__}")
    return dict(parts)
