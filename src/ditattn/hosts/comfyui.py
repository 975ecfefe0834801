"""ComfyUI: a sparse backend of ours for the attention of one MODEL, by the interface that nodes have.

A node gets a clone of the model with an `optimized_attention_override` and two wrappers: one around the sampling, one around each forward
of the diffusion model. Nothing of ComfyUI's is imported or patched, and the model that went in stays as it was. Nodes: `comfyui/`.
Source: ComfyUI 0.3.64 and its files of 2026, comfy/ldm and comfy/model_patcher.py.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ditattn.backends.config import PRESETS
from ditattn.backends.registry import RECOMMENDED_BACKEND, usable_backends
from ditattn.backends.setting import Setting
from ditattn.backends.sparse import SparseAttentionImpl
from ditattn.devices import find_device
from ditattn.errors import BackendUnavailable, ConfigError, UnsupportedModel
from ditattn.models import ModelFamily, TokenLayout
from ditattn.plan.token_grids import TokenGrid
from ditattn.runtime.forward import Forward, running
from ditattn.runtime.report import AttentionReport
from ditattn.runtime.served_model import ServedModel
from ditattn.runtime.stage import DenoisingStage
from ditattn.runtime.step import Step, StepClock

__all__ = ["Handle", "SigmaClock", "attach", "backend_choices", "density_picture", "keys_of", "preset_choices"]

OVERRIDE = "optimized_attention_override"
# ComfyUI's names of the places where wrappers go
AROUND_SAMPLING, AROUND_FORWARD = "outer_sample", "diffusion_model"
WRAPPER_KEY = "ditattn"
FROM_THE_PRESET = "preset"

# arguments of ComfyUI's attention that are honoured or mean nothing to an exact kernel of ours; others are left to ComfyUI
KNOWN_ARGUMENTS = frozenset({"transformer_options", "_inside_attn_wrapper", "scale", "enable_gqa", "low_precision_attention"})
UNKNOWN_ARGUMENT = "an argument of ComfyUI's that is not known here"


def _grid(latents: Tensor, patch: tuple[int, ...]) -> tuple[int, int, int]:
    """(F, Y, X) of latents `[B, C, (T,) H, W]`, which the models pad to whole patches."""
    frames = math.ceil(latents.shape[2] / patch[-3]) if latents.ndim == 5 and len(patch) == 3 else 1
    rows, columns = (math.ceil(size / p) for size, p in zip(latents.shape[-2:], patch[-2:], strict=True))
    return frames, rows, columns


def _layout(x: Tensor, grids: list[tuple[int, int, int]], target: int = 0, prefix: int = 0, suffix: int = 0) -> TokenLayout:
    """Of grids one behind the other, with so many tokens of text before and behind them."""
    starts = [prefix + sum(map(math.prod, grids[:number])) for number in range(len(grids))]
    tokens = [TokenGrid(start, size) for start, size in zip(starts, grids, strict=True)]
    return TokenLayout.of_grids(x.shape[0], x.shape[1], tokens, tokens[-1].stop + suffix, target)


def _wan(model: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """The video, which conditions may make longer, behind a reference image; the text is in cross-attention."""
    x, patch = arguments["x"], tuple(model.patch_size)
    frames, rows, columns = _grid(x, patch)
    more = arguments.get("time_dim_concat")
    if more is not None:
        frames += _grid(more, patch)[0]
    reference = arguments.get("reference_latent")
    if model.ref_conv is None or reference is None:
        return _layout(x, [(frames, rows, columns)])
    return _layout(x, [_grid(reference, patch), (frames, rows, columns)], target=1)


def _flux(model: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """Text, image, reference images."""
    images = [arguments["x"], *(arguments.get("ref_latents") or ())]
    patch = (model.patch_size, model.patch_size)
    return _layout(images[0], [_grid(one, patch) for one in images], prefix=arguments["context"].shape[1])


def _qwen_image(model: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """Text, image, reference images; the latents have an axis of frames."""
    images = [arguments["x"], *(arguments.get("ref_latents") or ())]
    patch = (1, model.patch_size, model.patch_size)
    return _layout(images[0], [_grid(one, patch) for one in images], prefix=arguments["context"].shape[1])


def _hunyuan_video(model: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """A reference image, the video, all kinds of text behind them."""
    x, patch = arguments["x"], tuple(model.patch_size)
    reference, glyphs = arguments.get("ref_latent"), arguments.get("txt_byt5")
    text = arguments["context"].shape[1] + (0 if glyphs is None or model.byt5_in is None else glyphs.shape[1])
    if reference is None:
        return _layout(x, [_grid(x, patch)], suffix=text)
    return _layout(x, [_grid(reference, patch), _grid(x, patch)], target=1, suffix=text)


def _ltx(model: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """The video with the frames that guide it; the text is in cross-attention."""
    x = arguments["x"]
    return _layout(x, [_grid(x, tuple(model.patchifier.patch_size))])


def _family(name: str, classes: tuple[str, ...], layout: Callable[[Any, Mapping[str, Any]], TokenLayout], **more: Any) -> ModelFamily:
    # calls are known by their tokens here, not by the paths of modules
    return ModelFamily(name=name, transformer_classes=classes, layout=layout, self_attention="", **more)


FAMILIES: tuple[ModelFamily, ...] = (
    _family("Wan", ("WanModel",), _wan),
    _family("HunyuanVideo", ("HunyuanVideo",), _hunyuan_video, suffix_varies=True),
    _family("Flux", ("Flux",), _flux),
    _family("Qwen-Image", ("QwenImageTransformer2DModel",), _qwen_image),
    _family("LTX-Video", ("LTXVModel",), _ltx),
)


def family_of(model: Any) -> ModelFamily | None:
    """Of a diffusion model, by the name of its class or of one that it derives from."""
    names = [cls.__name__ for cls in type(model).__mro__]
    return next((family for name in names for family in FAMILIES if name in family.transformer_classes), None)


class SigmaClock(StepClock):
    """The step of a forward is the place of its sigma in the sampler's schedule, both from `transformer_options`.

    Samplers of second order look at sigmas between two steps; those belong to the step that began before them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sigmas: tuple[object, list[float]] | None = None

    def read(self, cache_context: Any, branch: str | None, timestep: Any, driver: Any = None) -> Step:
        """`driver` is the forward's `transformer_options`. Reads the device once per forward."""
        sigmas, schedule = driver.get("sigmas"), driver.get("sample_sigmas")
        if sigmas is None or schedule is None:
            return Step(None, None, "none")
        if self._sigmas is None or self._sigmas[0] is not schedule:
            self._sigmas = (schedule, [float(sigma) for sigma in schedule.tolist()])
        steps = self._sigmas[1][:-1]
        if not steps:
            return Step(None, None, "none")
        sigma = float(sigmas.max())
        begun = [number for number, start in enumerate(steps) if start >= sigma * (1 - 1e-4)]
        return Step(begun[-1] if begun else 0, len(steps), "sigmas")


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


class Call:
    """One call of ComfyUI's attention, and how it would run without us.

    Args:
        function: ComfyUI's own, or that of a node before ours.
        q, k, v: `[B, S, H * D]`, or `[B, H, S, D]` with `skip_reshape`.
        more: every further argument, by name.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None,
        attn_precision: Any,
        skip_reshape: bool,
        skip_output_reshape: bool,
        more: Mapping[str, Any],
    ) -> None:
        self.mask, self.more = mask, more
        self._function, self._qkv, self._heads = function, (q, k, v), heads
        self._precision, self._split, self._answer_split = attn_precision, skip_reshape, skip_output_reshape

    @property
    def options(self) -> Mapping[str, Any]:
        return self.more.get("transformer_options") or {}

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views `[B, S, H, D]`."""
        q, k, v = self._qkv
        if self._split:
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        head_size = q.shape[-1] // self._heads
        return q.unflatten(-1, (-1, head_size)), k.unflatten(-1, (-1, head_size)), v.unflatten(-1, (-1, head_size))

    def native(self) -> Tensor:
        """In ComfyUI's form."""
        return self._function(
            *self._qkv,
            self._heads,
            mask=self.mask,
            attn_precision=self._precision,
            skip_reshape=self._split,
            skip_output_reshape=self._answer_split,
            **self.more,
        )

    def native_tensor(self) -> Tensor:
        """The same as `[B, S, H, D]`."""
        out = self.native()
        return out.transpose(1, 2) if self._answer_split else out.unflatten(-1, (self._heads, -1))

    def answer(self, out: Tensor) -> Tensor:
        """`[B, S, H, D]` in the form that was asked for."""
        return out.transpose(1, 2) if self._answer_split else out.flatten(2)


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
        return executor(*args, **kwargs)

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


def backend_choices() -> list[str]:
    """Names of the sparse backends, the recommended one first."""
    names = [one.name for one in usable_backends() if issubclass(one.get_impl_cls(), SparseAttentionImpl)]
    return sorted(names, key=lambda name: name != RECOMMENDED_BACKEND)


def preset_choices() -> list[str]:
    """Names of the presets, the default one first."""
    return sorted(PRESETS, key=lambda name: name != "balanced")


def keys_of(preset: str, sparsity: float, dense_steps: str) -> dict[str, Any]:
    """Keys from the widgets of the node.

    Args:
        sparsity: -1 takes the preset's.
        dense_steps: first steps that run densely, "auto", a number, or a share such as "20%"; "preset" takes the preset's.
    """
    keys: dict[str, Any] = {"preset": preset}
    if sparsity != -1:
        keys["sparsity"] = round(sparsity, 4)
    if dense_steps.strip() != FROM_THE_PRESET:
        keys["skip_first_steps"] = dense_steps
    return keys


# from everything to nothing computed; a cell of which nothing is known
DENSE_COLOUR, SPARSE_COLOUR, UNKNOWN_COLOUR = (0.12, 0.16, 0.32), (0.98, 0.86, 0.45), (0.5, 0.5, 0.5)


def density_picture(handle: Handle, cell_pixels: int = 12) -> Tensor:
    """A row for each layer, a column for each step: from dark (dense) to light (little computed), grey where nothing ran.

    Returns:
        float32 `[1, height, width, 3]`, 0 to 1, as ComfyUI's images are; one grey cell if nothing ran. Several models share the columns and
        stand one below the other.
    """
    rows = []
    for model in handle.stage.models:
        densities = model.log.overall_densities()
        steps = max((step for step, _, _ in densities), default=-1) + 1
        layers = max((layer for _, layer, _ in densities), default=-1) + 1
        table = torch.full((layers, max(steps, model.log.schedule_steps or 0)), math.nan)
        for step, layer, density in densities:
            table[layer, step] = density
        rows.append(table)
    width = max((table.shape[1] for table in rows), default=1)
    padded = [torch.nn.functional.pad(table, (0, width - table.shape[1]), value=math.nan) for table in rows]
    table = torch.cat(padded) if padded and sum(map(len, padded)) else torch.full((1, 1), math.nan)
    dense, sparse, unknown = map(torch.tensor, (DENSE_COLOUR, SPARSE_COLOUR, UNKNOWN_COLOUR))
    share = table.clamp(0, 1).unsqueeze(-1)
    colours = torch.where(share.isnan(), unknown, share * dense + (1 - share) * sparse)
    return colours.repeat_interleave(cell_pixels, 0).repeat_interleave(cell_pixels, 1).unsqueeze(0)
