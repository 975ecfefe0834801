"""HunyuanVideo Framepack: earlier frames at three sizes, the section's video, then image and text tokens, in one joint attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ditattn.models.base import SINGLE_STREAM_LINEAR_LAYERS, ModelFamily, TokenLayout, num_patches, patch_triple

__all__ = ["HUNYUAN_VIDEO_FRAMEPACK"]

# frames, rows and columns of latents that make one token; what does not fill a token is padded
HISTORY = {"latents_clean": (1, 2, 2), "latents_history_2x": (2, 4, 4), "latents_history_4x": (4, 8, 8)}


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, T, H, W)`, the section's own frames; the history is in arguments of its own."""
    history = sum(num_patches(arguments[name], patch) for name, patch in HISTORY.items() if arguments.get(name) is not None)
    condition = int(arguments["image_embeds"].shape[1]) + _num_text(arguments["encoder_attention_mask"])
    return TokenLayout(tuple(arguments["hidden_states"].shape), patch_triple(config), history, condition)


# a pipeline passes the same mask in every step: reading it costs a device synchronisation, once per run
_lengths: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _num_text(mask: Tensor) -> int:
    """Padded text is cut off, except in batches, where it stays and is masked."""
    if mask.shape[0] > 1:
        return int(mask.shape[1])
    if mask not in _lengths:
        _lengths[mask] = int(mask.sum())
    length: int = _lengths[mask]
    return length


HUNYUAN_VIDEO_FRAMEPACK = ModelFamily(
    name="HunyuanVideo Framepack",
    transformer_classes=("HunyuanVideoFramepackTransformer3DModel",),
    layout=layout,
    self_attention=r"(transformer_blocks|single_transformer_blocks)\.\d+\.attn",
    linear_layers=SINGLE_STREAM_LINEAR_LAYERS,
    size_multiple=16,
    notes="earlier frames before the video, image and text behind it, all protected; steps begin anew with every section",
)
