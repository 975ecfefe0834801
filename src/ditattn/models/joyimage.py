"""JoyImage Edit: the image, then the images that it is made from, then text tokens, in one joint attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, patch_triple, text_length
from ditattn.plan.token_grids import TokenGrid

__all__ = ["JOYIMAGE"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, N, C, T, H, W)`: N images, the last of which the model puts first; or `(B, C, T, H, W)`, the image alone.

    The Plus model takes patches `(B, P, C, t, h, w)`, and in `shape_list` for each sample the (T, H, W) in tokens of every image, the
    sample's own first.

    Raises:
        ValueError: samples of one batch differ in `shape_list`.
    """
    shape, patch, text = tuple(arguments["hidden_states"].shape), patch_triple(config), text_length(arguments)
    shapes = arguments.get("shape_list")
    if shapes is None:
        size = tuple(length // p for length, p in zip(shape[-3:], patch, strict=True))
        sizes, length = [size] * (shape[1] if len(shape) == 6 else 1), None
    elif any(list(sample) != list(shapes[0]) for sample in shapes):
        raise ValueError(f"samples of one batch differ in shape_list: {shapes}")
    else:
        sizes, length = [tuple(map(int, one)) for one in shapes[0]], shape[1]
    grids: list[TokenGrid] = []
    for frames, rows, columns in sizes:
        grids.append(TokenGrid(grids[-1].stop if grids else 0, (frames, rows, columns)))
    return TokenLayout.of_grids(shape[0], shape[-4], grids, (grids[-1].stop if length is None else length) + text)


def head_size(config: Any) -> int:
    return int(config.hidden_size) // int(config.num_attention_heads)


JOYIMAGE = ModelFamily(
    name="JoyImage Edit",
    transformer_classes=("JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel"),
    layout=layout,
    self_attention=r"double_blocks\.\d+\.attn",
    head_size=head_size,
    notes="given images, which have blocks of their own, and text after the image",
)
