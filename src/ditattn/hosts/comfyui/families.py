"""Where the tokens of ComfyUI's diffusion models stand: each family's layout from the model and its forward's arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ditattn.models import ModelFamily, TokenLayout
from ditattn.plan.token_grids import TokenGrid

__all__ = ["FAMILIES", "family_of"]


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
