"""What one node has put on a model: the forwards of its samplings, their attention calls, and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditattn.backends.setting import Setting
from ditattn.hosts.comfyui.call import Call
from ditattn.hosts.comfyui.families import FAMILIES, family_of
from ditattn.hosts.comfyui.sigma_clock import SigmaClock
from ditattn.runtime.forward import Forward
from ditattn.runtime.report import AttentionReport
from ditattn.runtime.served_model import ServedModel
from ditattn.runtime.stage import DenoisingStage

__all__ = ["Handle"]

# arguments of ComfyUI's attention that are honoured or mean nothing to an exact kernel of ours; others are left to ComfyUI
KNOWN_ARGUMENTS = frozenset({"transformer_options", "_inside_attn_wrapper", "scale", "enable_gqa", "low_precision_attention"})
UNKNOWN_ARGUMENT = "an argument of ComfyUI's that is not known here"


class Handle:
    """What one node has put on a model: its setting, and what ran in the last sampling."""

    def __init__(self, setting: Setting, backend: Any) -> None:
        self.setting = setting
        self.backend = backend
        self.begin()

    def begin(self) -> None:
        """A sampling begins: everything that the last one left is forgotten."""
        self.stage = DenoisingStage(SigmaClock())
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._seen: dict[tuple[Any, ...], int] = {}
        self._masks: dict[int, tuple[Tensor, Tensor]] = {}

    def end(self) -> None:
        """The sampling ended: what its steps kept for each other is released, and the report stays."""
        self.stage.reset()
        self._masks = {}

    def report(self) -> AttentionReport:
        """What ran in the last sampling."""
        return self.stage.report()

    def enter(self, model: Any, arguments: Mapping[str, Any]) -> Forward | None:
        """A forward of a diffusion model begins; None if it is not of a family that is known here."""
        family = family_of(model)
        name = type(model).__name__
        if family is None:
            known = ", ".join(one.name for one in FAMILIES)
            self.stage.not_served[name] = f"where its picture stands among the tokens is not known for ComfyUI; it is for {known}"
            return None
        served = next((one for one in self.stage.models if one.model_config is model), None)
        if served is None:
            others = sum(type(one.model_config).__name__ == name for one in self.stage.models)
            unique = f"{name} {others + 1}" if others else name
            served = ServedModel(unique, family, model, self.backend, self.setting.config_of(self.backend), [], layers_by_count=False)
            self.stage.models.append(served)
        options = arguments.get("transformer_options") or {}
        self._seen, self._masks = {}, {}
        return self.stage.enter(served, arguments, branch=str(options.get("uuids", "")), driver=options)

    def attend(self, forward: Forward, call: Call) -> Tensor:
        """One attention call inside a forward, in ComfyUI's form."""
        query, key, value = call.tensors()
        forward.layer = None
        if not _is_self_attention(forward, query, key):
            return call.native()
        forward.layer = self._layer_number(call.options)
        strange = sorted(call.more.keys() - KNOWN_ARGUMENTS)
        if strange or value.shape != key.shape:
            self.stage.count_native(forward, query, key, f"{UNKNOWN_ARGUMENT}: {', '.join(strange) or 'values of another size than keys'}")
            return call.native()
        forward.native = call.native_tensor
        out = self.stage.attend(forward, query, key, value, self._mask(call.mask), False, call.more.get("scale"))
        forward.native = None
        return call.answer(out)

    def _layer_number(self, options: Mapping[str, Any]) -> int:
        """The block that ComfyUI names, where it names one, else the place among the forward's calls."""
        block = (options["block_type"], options["block_index"]) if "block_index" in options and "block_type" in options else ("call",)
        times = self._seen[block] = self._seen.get(block, 0) + 1
        return self._numbers.setdefault((*block, times), len(self._numbers))

    def _mask(self, mask: Tensor | None) -> Tensor | None:
        """As torch's SDPA takes it, the same object for all layers of a forward; an additive mask that hides keys is one of truths."""
        if mask is None:
            return None
        if id(mask) not in self._masks:
            shaped = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
            # the mask itself is kept beside it, so that no other gets its number
            self._masks[id(mask)] = (mask, _as_truths(shaped))
        return self._masks[id(mask)][1]


def _as_truths(mask: Tensor) -> Tensor:
    """Reads the device where the mask is additive."""
    if not mask.is_floating_point() or mask.shape[-2] != 1:
        return mask
    keep, hidden = mask == 0, mask <= torch.finfo(mask.dtype).min / 2
    return keep if bool((keep | hidden).all()) else mask


def _is_self_attention(forward: Forward, query: Tensor, key: Tensor) -> bool:
    """Calls that look at something else, or at fewer tokens than the picture has (a refiner of the text), are not the denoiser's own."""
    layout = forward.layout
    return query.shape[1] == key.shape[1] and (layout is None or query.shape[1] >= layout.num_video_tokens)
