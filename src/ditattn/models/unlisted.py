"""Denoisers that nobody described: what modules and configuration tell of one, and the start of a file for its family."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ditattn.models.base import ModelFamily, TokenLayout

__all__ = ["BY_RULE", "GridReading", "described", "family_by_rule", "grid_readings", "latents_of", "patches_of_config", "pattern_of"]

BY_RULE = "unlisted: by rule"
"""Name of the family of every such denoiser."""

# how attention modules call what makes queries and keys of their input, and what makes queries, keys and values at once
PROJECTIONS = (("to_q", "to_k"), ("q_proj", "k_proj"), ("wq", "wk"), ("query", "key"), ("q", "k"))
FUSED = ("to_qkv", "qkv", "qkv_proj", "in_proj", "Wqkv")
NUMBERS_OF_HEADS = ("heads", "num_heads", "num_attention_heads", "n_heads")
SIZES_OF_HEADS = ("head_dim", "dim_head", "attention_head_dim", "head_size")
# the axes of latents in the orders that models have them in
AXES = {4: ("BCYX", "BYXC"), 5: ("BCFYX", "BFCYX", "BFYXC")}


@dataclass(frozen=True)
class GridReading:
    """One way to read latents as a grid of tokens.

    Attributes:
        axes: what each axis of the latents is: B batch, C channels, F frames, Y rows, X columns.
        patch: (t, h, w) latents that make one token.
    """

    axes: str
    patch: tuple[int, int, int]

    def raw_shape(self, latents: Tensor) -> tuple[int, int, int, int, int]:
        """`(B, C, T, H, W)`."""
        size = {axis: int(length) for axis, length in zip(self.axes, latents.shape, strict=True)}
        return size["B"], size["C"], size.get("F", 1), size["Y"], size["X"]

    def layout(self, latents: Tensor, prefix: int = 0, suffix: int = 0) -> TokenLayout:
        """With so many tokens before and after the grid.

        Raises:
            ValueError: the latents are no whole number of patches.
        """
        shape = self.raw_shape(latents)
        if any(length % p for length, p in zip(shape[2:], self.patch, strict=True)):
            raise ValueError(f"latents {tuple(latents.shape)} are no whole number of patches {self.patch}")
        return TokenLayout(shape, self.patch, prefix, suffix)


def family_by_rule(module: nn.Module, layout: Any) -> ModelFamily:
    """What is true of a denoiser of no family by its modules.

    Args:
        module: the denoiser.
        layout: the family's `layout`.

    Raises:
        ValueError: it is no denoiser, its self-attention is not found, or has heads of unknown or unequal size; says which.
    """
    if not _takes_a_time(module):
        raise ValueError(
            f"its forward takes no timestep, so it is no denoiser ({', '.join(inspect.signature(type(module).forward).parameters)})"
        )
    parts = {path: part for path, part in module.named_modules() if _is_self_attention(part)}
    if not parts:
        names = ", ".join(f"{query}/{key}" for query, key in PROJECTIONS)
        raise ValueError(f"no module in it makes queries and keys of one input (looked for {names}, {', '.join(FUSED)})")
    sizes = {_head_size(part) for part in parts.values()}
    if len(sizes) != 1 or None in sizes:
        known = ", ".join(sorted(map(str, sizes - {None}))) or "none that is known"
        raise ValueError(f"its heads must be of one size; found {known} in {', '.join(list(parts)[:3])}{', ...' if len(parts) > 3 else ''}")
    (size,) = sizes
    assert size is not None
    has_processors = all(hasattr(part, "processor") for part in parts.values())
    return ModelFamily(
        name=BY_RULE,
        transformer_classes=(type(module).__name__,),
        layout=layout,
        self_attention=pattern_of(set(parts), {path for path, _ in module.named_modules()}),
        head_size=lambda config: size,
        has_processors=has_processors,
        dispatches=has_processors and all(hasattr(part.processor, "_attention_backend") for part in parts.values()),
    )


def _takes_a_time(module: nn.Module) -> bool:
    """Some parameter of its forward may be a time or a level of noise."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
        return True
    return any(one.name == "t" or re.search("time|sigma|noise|step", one.name) for one in parameters)


def _is_self_attention(part: nn.Module) -> bool:
    """Queries and keys are made of one input, as far as shapes tell."""
    if getattr(part, "is_cross_attention", False):
        return False
    if any(isinstance(getattr(part, name, None), nn.Module) for name in FUSED):
        return True
    pairs = [(getattr(part, query, None), getattr(part, key, None)) for query, key in PROJECTIONS]
    return any(
        isinstance(query, nn.Module) and isinstance(key, nn.Module) and _inputs(query) == _inputs(key) is not None for query, key in pairs
    )


def _inputs(projection: nn.Module) -> int | None:
    width = getattr(projection, "in_features", None)
    return width if isinstance(width, int) else None


def _head_size(part: nn.Module) -> int | None:
    """By the module's own word, else width by number of heads."""
    told = next((value for name in SIZES_OF_HEADS if isinstance(value := getattr(part, name, None), int) and value > 0), None)
    if told is not None:
        return told
    heads = next((value for name in NUMBERS_OF_HEADS if isinstance(value := getattr(part, name, None), int) and value > 0), None)
    width = _query_width(part)
    return None if heads is None or width is None or width % heads else width // heads


def _query_width(part: nn.Module) -> int | None:
    single = next((found for name, _ in PROJECTIONS if isinstance(found := getattr(part, name, None), nn.Module)), None)
    projection = single or next((found for name in FUSED if isinstance(found := getattr(part, name, None), nn.Module)), None)
    width = getattr(projection, "out_features", None)
    if not isinstance(width, int):
        return None
    return width if single is not None else width // 3


def pattern_of(paths: set[str], others: set[str]) -> str:
    """A regular expression of just these paths: by any number where that matches no other."""
    general = sorted({re.sub(r"(^|\\\.)\d+(?=\\\.|$)", r"\1\\d+", re.escape(path)) for path in paths})
    pattern = "|".join(general)
    if {path for path in others if re.fullmatch(pattern, path)} == paths:
        return pattern
    return "|".join(re.escape(path) for path in sorted(paths))


def latents_of(arguments: Mapping[str, Any]) -> tuple[str, Tensor]:
    """Name and value of the forward's latents: `hidden_states`, else the first tensor with four or five axes.

    Raises:
        ValueError: there is none, or it is packed, so that its shape does not tell the grid.
    """
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point()}
    named = tensors.get("hidden_states")
    if named is not None and named.ndim not in AXES:
        raise ValueError(f"hidden_states {tuple(named.shape)} are packed: their shape does not tell frames, rows and columns")
    found = [(name, value) for name, value in tensors.items() if value.ndim in AXES]
    if not found:
        raise ValueError(f"no argument of its forward is latents with rows and columns ({', '.join(tensors) or 'no tensors'})")
    return ("hidden_states", named) if named is not None else found[0]


def grid_readings(config: Any, module: nn.Module, latents: Tensor) -> Iterator[GridReading]:
    """The ways to read the latents, the likeliest first: by the configuration, then by the patch embeddings, then one latent a token."""
    channels = getattr(config, "in_channels", None)
    orders = AXES[latents.ndim]
    fitting = [axes for axes in orders if latents.shape[axes.index("C")] == channels]
    for patch in dict.fromkeys([*patches_of_config(config), *_patches_of_convolutions(module), (1, 1, 1)]):
        for axes in fitting or orders:
            reading = GridReading(axes, patch)
            shape = reading.raw_shape(latents)[2:]
            if all(length >= p and length % p == 0 for length, p in zip(shape, patch, strict=True)):
                yield reading


def patches_of_config(config: Any) -> list[tuple[int, int, int]]:
    """The patch (t, h, w) that a configuration tells; none if it tells none."""
    patch, frames = getattr(config, "patch_size", None), getattr(config, "patch_size_t", None) or 1
    if isinstance(patch, int):
        return [(int(frames), patch, patch)]
    if isinstance(patch, (list, tuple)) and len(patch) in (2, 3) and all(isinstance(p, int) for p in patch):
        return [(*((frames,) if len(patch) == 2 else ()), *patch)]
    return []


def _patches_of_convolutions(module: nn.Module) -> list[tuple[int, int, int]]:
    """Kernels of convolutions that are as large as their strides: what patch embeddings are made of."""
    found = [part for part in module.modules() if isinstance(part, (nn.Conv2d, nn.Conv3d)) and part.kernel_size == part.stride]
    kernels = [tuple(int(size) for size in part.kernel_size) for part in found]
    return [kernel if len(kernel) == 3 else (1, *kernel) for kernel in kernels]  # type: ignore[misc]


def described(
    family: ModelFamily, reading: GridReading, latents: str, layout: TokenLayout, text: Tensor | None, self_attention: str
) -> str:
    """A file for the family, to be read over and named: what the rule found for one forward.

    Args:
        family: by rule.
        reading: that was found true.
        latents: their name among the forward's arguments.
        layout: of the forward.
        text: its `encoder_hidden_states`, if it has such.
        self_attention: pattern of the modules that were seen to be.
    """
    (cls,) = family.transformer_classes
    axes = [{"B": "batch", "C": "channels", "F": "frames", "Y": "rows", "X": "columns"}[axis] for axis in reading.axes]
    length = None if text is None or text.ndim != 3 else text.shape[1]
    told = [
        "text_length(arguments)" if tokens and tokens == length else str(tokens)
        for tokens in (layout.num_prefix_tokens, layout.num_suffix_tokens)
    ]
    imports = "ModelFamily, TokenLayout, text_length" if "text_length(arguments)" in told else "ModelFamily, TokenLayout"
    options = "".join(f"{option}=False, " for option in ("dispatches", "has_processors") if not getattr(family, option))
    frames = "frames" if "F" in reading.axes else "1"
    return "\n".join(
        [
            f"from ditattn.models.base import {imports}",
            "",
            "def layout(config, arguments):",
            f'    {", ".join(axes)} = arguments["{latents}"].shape',
            f"    return TokenLayout((batch, channels, {frames}, rows, columns), {reading.patch}, {told[0]}, {told[1]})",
            "",
            f'FAMILY = ModelFamily(name="{cls}", transformer_classes=("{cls}",), layout=layout,',
            f'    self_attention=r"{self_attention}",',
            f"    {options}head_size=lambda config: {family.head_size(None)})",
        ]
    )
