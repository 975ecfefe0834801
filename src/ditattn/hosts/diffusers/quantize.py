"""quantize: the linear layers of a pipeline's denoisers in MXFP4, and undo it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ditattn.arguments import described
from ditattn.errors import ConfigError, UnsupportedModel
from ditattn.hosts.diffusers.install import denoisers, self_attention_modules
from ditattn.models import ModelFamily, family_of, unwrapped, why_not_served
from ditattn.quantization.handle import QuantizedComponent, QuantizedModel, refuse_saving
from ditattn.quantization.layers import Place, skipped
from ditattn.quantization.quantize import (
    Make,
    check_any,
    layers_of_checkpoint,
    layers_of_rule,
    open_checkpoint,
    reading,
    replace_layers,
    rounding,
    warn_without_units,
)
from ditattn.quantization.request import Quantization

__all__ = ["quantize", "quantize_setting"]

logger = logging.getLogger("ditattn")


def quantize(
    target: Any,
    method: str | None = None,
    *,
    skip: str | Iterable[str] = (),
    checkpoint: str | Path | None = None,
    keep_originals: bool = True,
) -> QuantizedModel:
    """Run the linear layers of every denoiser's blocks in MXFP4 (4-bit weights and activations): attention projections and feed-forward.

    Embeddings, norms, modulation and the last projection stay as they were. Composes with `install`, in either order, and is undone in
    either order. Weights take 4.25 bits a value. Only Ascend 950 multiplies such numbers as they are; elsewhere it saves memory, not time.

    Args:
        target: a diffusers pipeline, or a bare transformer.
        method: "mxfp4" (OCP specification) or "mxfp4_dualscale" (a float32 scale for every 512 values above it, as Ascend's kernels have).
        skip: patterns of layers that stay as they are, such as "blocks.0.*" or "transformer_2.*.ffn.*".
        checkpoint: instead of a method, the folder of an msmodelslim checkpoint; it says which layers are quantised, and how. Where there
            are several denoisers, each has a folder in it, named after the component.
        keep_originals: keep the plain weights in host memory, for the undo. False frees them.

    Returns:
        A handle with `report()` and `remove()`; also a context manager.

    Raises:
        ConfigError: an unknown method, a pattern that names no layer, a checkpoint that does not fit or has kinds that are not known.
        UnsupportedModel: no denoiser found, none of a known family, or no layer that can be quantised.

    Examples:
        >>> import ditattn
        >>> from diffusers import DiffusionPipeline
        >>> pipe = DiffusionPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
        >>> quantized = ditattn.quantize(pipe, "mxfp4", skip="blocks.0.*")
        >>> with ditattn.install(pipe, "permuted_sparse_attn", sparsity=0.75):
        ...     frames = pipe(prompt="a cat walks on the grass", num_inference_steps=50).frames[0]
        >>> print(quantized.report().summary())  # doctest: +ELLIPSIS
        quantisation (transformer): ... linear layers (... in mxfp4), all ran; weights ... MiB less...
        >>> quantized.remove()
    """
    return quantize_setting(target, Quantization.parse(method, skip=skip, checkpoint=checkpoint), keep_originals=keep_originals)


def quantize_setting(target: Any, asked: Quantization, *, keep_originals: bool = True) -> QuantizedModel:
    """`quantize` of what was parsed before. Raises as `quantize`, but for what `Quantization.parse` has checked."""
    if not isinstance(keep_originals, bool):
        raise ConfigError(f"keep_originals must be True or False, not {described(keep_originals)}")
    handle = QuantizedModel(keep_originals)
    plan = _plan(handle, denoisers(target), asked)
    left_out = skipped(asked.skip, {name: list(layers) for name, (_, layers, _) in plan.items()})
    try:
        for name, (module, layers, make) in plan.items():
            component = QuantizedComponent(module, keep_originals)
            handle.components[name] = component
            handle.on_remove(component.restore)
            handle.on_remove(refuse_saving(module))
            replace_layers(component, layers, {path for owner, path in left_out if owner == name}, make)
            warn_without_units(component)
        check_any(handle.components.values())
    except BaseException:
        handle.undo_after_failure()
        raise
    return handle


def _plan(
    handle: QuantizedModel, models: dict[str, nn.Module], asked: Quantization
) -> dict[str, tuple[nn.Module, dict[str, list[Place]], Make]]:
    """(module, layers, how they are made) by component. What is not served is noted."""
    plan: dict[str, tuple[nn.Module, dict[str, list[Place]], Make]] = {}
    for name, found in models.items():
        module = unwrapped(found)
        family = family_of(module)
        if family is None:
            reason = why_not_served(module)
            _leave_alone(
                handle, name, f"{type(module).__name__} is not " + ("a known model family" if reason is None else f"served: {reason}")
            )
            continue
        layers, make = _layers(module, name, len(models) == 1, family, asked)
        if make is None:
            _leave_alone(handle, name, f"{asked.checkpoint} has no folder {name}")
        else:
            plan[name] = (module, layers, make)
    if not plan:
        why = "; ".join(f"{name}: {reason}" for name, reason in handle.not_served.items()) or "no component is named transformer*"
        raise UnsupportedModel(f"nothing can be quantised: {why}")
    return plan


def _layers(
    module: nn.Module, name: str, only: bool, family: ModelFamily, asked: Quantization
) -> tuple[dict[str, list[Place]], Make | None]:
    if asked.method is not None:
        return layers_of_rule(module, family, list(self_attention_modules(module, family))), rounding(asked.method)
    checkpoint = open_checkpoint(Path(str(asked.checkpoint)), name, only, family)
    if checkpoint is None:
        return {}, None
    return layers_of_checkpoint(module, checkpoint), reading(checkpoint)


def _leave_alone(handle: QuantizedModel, name: str, reason: str) -> None:
    logger.warning("%s is not quantised: %s", name, reason)
    handle.not_served[name] = reason
