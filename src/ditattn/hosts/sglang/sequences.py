"""What stands where in the token sequences of sglang's denoisers, model by model.

sglang says what the latents of a request are like. Where its models put text, references and padding beside them, and in which order
ranks gather them, is read in their source; the rest of a call's tokens follows from how many it has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ditattn.models import TokenLayout
from ditattn.plan.split import GatheredTokens
from ditattn.plan.token_grids import TokenGrid

__all__ = ["CallTokens", "Latents", "ModelSequence", "call_tokens", "latents_of", "sequence_of"]

Size = tuple[int, int, int]


@dataclass(frozen=True)
class ModelSequence:
    """The sequence of a model's self-attention: `[text][target][references]`, or the text behind.

    Attributes:
        text: where it stands, with everything that the model puts in no grid: "front", "behind", or "" where there is none.
        shared_text: how ranks share it. "whole": each has it, and it stands once where they gather; "parts": each has a part beside its
            part of the video; "even": the same where sglang finds the parts long enough, else whole; "" where that is not known here.
        whole_frames: ranks share the target by frames alone; other numbers of frames sglang leaves whole on every rank.
        packed: what latents of three axes are, `[B, S, C]` tokens in raster order: "image" or "video"; "" where that is not known.
        without_metadata: its denoising stage builds no metadata, and what it counts are steps.
        patch_size: (t, h, w), where sglang's configuration has none under that name.
        text_layers: regular expression of the layers that see the text alone.
        one_prefix: all its blocks have the same prefix, which tells no layer from another.
    """

    text: str = ""
    shared_text: str = ""
    whole_frames: bool = False
    packed: str = ""
    without_metadata: bool = False
    patch_size: Size | None = None
    text_layers: str | None = None
    one_prefix: bool = False

    def sees_text_alone(self, path: str) -> bool:
        """True for layers whose sequences have no grid, however long they are."""
        return self.text_layers is not None and re.fullmatch(self.text_layers, path) is not None


# eight for the VAE, two for the patch, in all image models whose latents are packed; checked against the number of tokens
PIXELS_OF_AN_IMAGE_TOKEN = 16

TARGET_ALONE = ModelSequence()
# text and image are each padded to a multiple of 32, and their padding is attended to: with the text, it is what is in no grid
Z_IMAGE = ModelSequence("behind", patch_size=(1, 2, 2))
# audio has layers of its own
LTX = ModelSequence(packed="video", one_prefix=True)

# by the prefix of the model's configuration, in lower case
SEQUENCES = {
    "hunyuan": ModelSequence("behind", "parts", whole_frames=True, text_layers=r"layer \d+"),
    "ernieimage": ModelSequence("behind"),
    "lingbotvideo": ModelSequence("behind"),
    "joyimage": ModelSequence("behind", "whole"),
    "zimage": Z_IMAGE,
    "ming_image": Z_IMAGE,
    "flux": ModelSequence("front", "even", packed="image"),
    "qwenimage": ModelSequence("front", "even", packed="image"),
    "qwenimageedit": ModelSequence("front", "even", packed="image"),
    "longcat_image": ModelSequence("front", "whole", packed="image"),
    "k2": ModelSequence("front", "whole", packed="image"),
    "ideogram4": ModelSequence("front", packed="image"),
    "glmimage": ModelSequence("front"),
    "ltx2": LTX,
    "ltx2_5": LTX,
    "joyecho": ModelSequence(one_prefix=True),
    "kandinsky6": ModelSequence(without_metadata=True),
    "mova_video": ModelSequence(without_metadata=True),
}


def sequence_of(prefix: str) -> ModelSequence:
    """By the prefix of a model's configuration; models that are not listed see the target alone."""
    return SEQUENCES.get(prefix, TARGET_ALONE)


@dataclass(frozen=True)
class Latents:
    """What a request has in grids.

    Attributes:
        batch, channels: of the latents.
        sizes: (F, Y, X) tokens of each grid, the target first.
        num_references: tokens of references that stand behind the target and whose grids are not known.
    """

    batch: int
    channels: int
    sizes: tuple[Size, ...]
    num_references: int = 0

    def layout(self, prefix: int = 0, suffix: int = 0) -> TokenLayout:
        """With so many tokens before and behind the grids. Raises ValueError for a grid without tokens."""
        if min(map(min, self.sizes)) < 1:
            raise ValueError(f"grids of {self.sizes} tokens")
        grids, start = [], prefix
        for size in self.sizes:
            grids.append(TokenGrid(start, size))
            start = grids[-1].stop
        return TokenLayout.of_grids(self.batch, self.channels, grids, start + suffix)


def latents_of(sequence: ModelSequence, metadata: Any, request: Any, pipeline: Any) -> Latents:
    """The grids of a request.

    Args:
        sequence: of the model.
        metadata: of a step; None where sglang builds none.
        request: sglang's, or None.
        pipeline: its configuration, or None.

    Raises:
        ValueError: no metadata, or latents of another form.
    """
    if metadata is None and not sequence.without_metadata:
        raise ValueError("sglang built no metadata for this step")
    shape = _whole_shape(metadata, request)
    batch, channels, *axes = (int(size) for size in shape)
    grids = getattr(request, "vae_image_sizes", None)
    if len(axes) == 4 and grids:
        # JoyImage: tokens `[B, S, C, t, h, w]` of several images, the target first
        return Latents(batch, int(shape[2]), tuple((int(f), int(y), int(x)) for f, y, x in grids))
    if len(axes) == 1:
        return _packed(sequence, (batch, int(shape[1]), int(shape[2])), request, pipeline)
    frames, rows, columns = axes if len(axes) == 3 else (1, *axes)
    patch = _patch(sequence, metadata, pipeline)
    t, h, w = (1, *patch[1:]) if len(axes) == 2 else patch
    return Latents(batch, channels, ((frames // t, rows // h, columns // w),))


def _whole_shape(metadata: Any, request: Any) -> Sequence[int]:
    said = getattr(metadata, "raw_latent_shape", None)
    if said is None:
        said = getattr(request, "raw_latent_shape", None)
    if said is None:
        said = request.latents.shape
    shape: Sequence[int] = said
    return shape


def _patch(sequence: ModelSequence, metadata: Any, pipeline: Any) -> Sequence[int]:
    said = sequence.patch_size or getattr(metadata, "patch_size", None)
    if said is None and pipeline is not None:
        said = getattr(pipeline.dit_config, "patch_size", None)
    if said is None:
        raise ValueError("the size of a patch is not known")
    patch: Sequence[int] = said
    return patch


def _packed(sequence: ModelSequence, shape: Size, request: Any, pipeline: Any) -> Latents:
    """The grid of `[B, S, C]` tokens, by the pixels of the request.

    Raises:
        ValueError: it has not as many tokens.
    """
    batch, num_tokens, channels = shape
    if not sequence.packed:
        raise ValueError(f"latents {shape} are packed")
    pixels = int(pipeline.vae_scale_factor) * int(pipeline.patch_size) if sequence.packed == "video" else PIXELS_OF_AN_IMAGE_TOKEN
    rows, columns = int(request.height) // pixels, int(request.width) // pixels
    frames = num_tokens // max(rows * columns, 1) if sequence.packed == "video" else 1
    if frames * rows * columns != num_tokens:
        raise ValueError(f"{num_tokens} tokens are no {frames} x {rows} x {columns}")
    # what conditions a video is written into its tokens
    references = _num_references(request) if sequence.packed == "image" else 0
    return Latents(batch, channels, ((frames, rows, columns),), references)


def _num_references(request: Any) -> int:
    """Tokens of references that the denoising stage appends to those of the target; a rank's own where ranks share them."""
    references = getattr(request, "image_latent", None)
    return 0 if references is None or references.ndim != 3 else int(references.shape[1])


class CallTokens(NamedTuple):
    """The tokens of one call.

    Attributes:
        layout: in the model's order.
        gathered: in the order of the call, where ranks gathered it; None where it is the model's.
    """

    layout: TokenLayout
    gathered: GatheredTokens | None


def call_tokens(sequence: ModelSequence, latents: Latents, path: str, num_tokens: int, ranks: int) -> CallTokens:
    """What stands where in a call of that many tokens, by the layer at `path`, that so many ranks gathered.

    Padding that nothing masks is attended to by sglang, so it stays where it is: a few tokens in no grid, kept whole as text is.

    Raises:
        ValueError: no grid is among them, or their order is not known.
    """
    if sequence.sees_text_alone(path):
        raise ValueError(f"{path} sees the text alone")
    target = [math.prod(size) for size in latents.sizes]
    if ranks == 1:
        text = num_tokens - sum(target) - latents.num_references
        return CallTokens(_layout(sequence, latents, text, latents.num_references), None)
    if sequence.whole_frames and latents.sizes[0][0] % ranks:
        raise ValueError(f"{ranks} ranks cannot share {latents.sizes[0][0]} frames: sglang leaves them whole on each")
    images, references = sum(target), latents.num_references * ranks
    padding = -images % ranks
    streams = [images + padding, references] if references else [images + padding]
    text = num_tokens - sum(streams)
    layout = _layout(sequence, latents, text, padding + references)
    if text <= 0 or not sequence.text:
        return CallTokens(layout, None)
    in_parts = _is_in_parts(sequence, text, ranks)
    if references and not in_parts:
        raise ValueError("ranks share the image and its references one beside the other, and have the text whole")
    in_order = [text, *streams] if sequence.text == "front" else [*streams, text]
    return CallTokens(layout, GatheredTokens(tuple(in_order), ranks) if in_parts else None)


def _layout(sequence: ModelSequence, latents: Latents, text: int, behind: int) -> TokenLayout:
    """With the text where the model puts it, and so many other tokens behind the target."""
    if text <= 0 or not sequence.text:
        # fewer or more tokens than the grids have: such a call is none of these grids
        return latents.layout(suffix=behind)
    return latents.layout(text, behind) if sequence.text == "front" else latents.layout(suffix=behind + text)


def _is_in_parts(sequence: ModelSequence, text: int, ranks: int) -> bool:
    """True where each rank has a part of the text, False where each has it whole.

    Raises:
        ValueError: not known here.
    """
    if sequence.shared_text == "parts":
        return text >= ranks
    if sequence.shared_text == "even":
        from sglang.multimodal_gen.runtime.distributed.sp_shard_utils import should_shard_text

        if not should_shard_text(text):
            return False
        if text % ranks:
            raise ValueError(f"{text} tokens of text are no even parts of {ranks} ranks")
        return True
    if not sequence.shared_text:
        raise ValueError("how ranks share the text is not known here")
    return False
