"""What the package knows about a family of diffusion transformers: data, and how to read its configuration and a call's token layout."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ditattn.errors import ConfigError
from ditattn.plan.token_grids import TokenGrid, grids_of_sequence

__all__ = [
    "DEFAULT_FRAME_RATE",
    "LINEAR_LAYERS",
    "SINGLE_STREAM_LINEAR_LAYERS",
    "ModelFamily",
    "SplitAxis",
    "SplitPlan",
    "TokenLayout",
    "image_layout",
    "one_more_than_a_multiple",
    "one_stream",
    "patch_triple",
    "prefix_and_rest",
    "rising",
    "text_length",
    "timestep",
    "video_and_suffix",
    "video_only",
]

DEFAULT_FRAME_RATE = 24
"""Frames per second where nothing else is known."""

# what stands beside projections and feed-forward under their names: norms, modulation, gates of heads and of experts
_NEITHER = r"(?!(.*[._])?(norm|modulation|embed|gate_logits|router)|.*\.gate$)"

LINEAR_LAYERS = _NEITHER + r"\w*(attn|attention|ff|mlp|feed_forward)\w*\..+"
"""Paths below a block that are attention projections and feed-forward, in most models."""

SINGLE_STREAM_LINEAR_LAYERS = LINEAR_LAYERS + "|proj_mlp|proj_out"
"""The same where blocks of one stream compute attention and feed-forward side by side, with one projection out of both."""


@dataclass(frozen=True)
class SplitAxis:
    """An axis of tokens.

    Attributes:
        axis: its number.
        ndim: axes of the tensor.
    """

    axis: int
    ndim: int


SplitPlan = Mapping[str, SplitAxis | Mapping[str | int, SplitAxis | tuple[SplitAxis, ...]]]


@dataclass(frozen=True)
class TokenLayout:
    """Where a forward's tokens stand in self-attention: `[prefix][video][suffix]`, and further grids in prefix and suffix.

    Attributes:
        raw_latent_shape: `(B, C, T, H, W)` of the latents, whatever axes the model itself uses.
        patch_size: (t, h, w); the token grid is the latent grid divided by it.
        num_prefix_tokens, num_suffix_tokens: all tokens before and after the video tokens.
        further_grids: references, conditions or layers among those tokens. What is in no grid (text, audio) is kept whole.
        num_image_suffix_tokens: of those after the video, how many follow it in layers without text too (padding of the image itself).

    Raises:
        ValueError: a latent shape without five axes or smaller than a patch, a negative count, as it comes from a sequence that is
            shorter than its grid, or grids that overlap or reach beyond the sequence.
    """

    raw_latent_shape: tuple[int, int, int, int, int]
    patch_size: tuple[int, int, int]
    num_prefix_tokens: int = 0
    num_suffix_tokens: int = 0
    further_grids: tuple[TokenGrid, ...] = ()
    num_image_suffix_tokens: int = 0

    def without_text(self) -> TokenLayout:
        """The layout of layers that see the video or image alone."""
        return replace(self, num_prefix_tokens=0, num_suffix_tokens=self.num_image_suffix_tokens, further_grids=())

    def __post_init__(self) -> None:
        if len(self.raw_latent_shape) != 5 or any(size < p for size, p in zip(self.raw_latent_shape[2:], self.patch_size, strict=True)):
            raise ValueError(f"latents {self.raw_latent_shape} do not make a grid of patches {self.patch_size}")
        if self.num_prefix_tokens < 0 or self.num_suffix_tokens < 0:
            raise ValueError(f"{self.num_prefix_tokens} tokens before and {self.num_suffix_tokens} after the video")
        if self.further_grids:
            grids_of_sequence(self.grid, self.num_prefix_tokens, self.num_suffix_tokens, self.further_grids)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(F, Y, X) tokens of the video."""
        frames, rows, columns = (size // p for size, p in zip(self.raw_latent_shape[2:], self.patch_size, strict=True))
        return frames, rows, columns

    @property
    def num_tokens(self) -> int:
        """Length of the whole sequence."""
        return self.num_prefix_tokens + math.prod(self.grid) + self.num_suffix_tokens

    @classmethod
    def of_grids(cls, batch: int, channels: int, grids: Sequence[TokenGrid], length: int, target: int = 0) -> TokenLayout:
        """The layout of a sequence of packed tokens.

        Args:
            batch, channels: of the packed latents.
            grids: all of them.
            length: tokens of the sequence.
            target: number of the grid that is generated.
        """
        own = grids[target]
        further = tuple(grid for number, grid in enumerate(grids) if number != target)
        return cls((batch, channels, *own.size), (1, 1, 1), own.start, length - own.stop, further_grids=further)

    @property
    def num_video_tokens(self) -> int:
        return math.prod(self.grid)


def one_stream(layout: TokenLayout) -> tuple[int, ...]:
    """The stream of a sequence that is split as a whole, conditions before and behind the video too."""
    return (layout.num_prefix_tokens + layout.num_video_tokens + layout.num_suffix_tokens,)


def prefix_and_rest(layout: TokenLayout) -> tuple[int, ...]:
    """Streams of a sequence whose text stands in front: what stands behind the video or image is split with it."""
    return (layout.num_prefix_tokens, layout.num_video_tokens + layout.num_suffix_tokens)


def video_and_suffix(layout: TokenLayout) -> tuple[int, ...]:
    """Streams of a sequence whose text stands behind the video."""
    return layout.num_prefix_tokens + layout.num_video_tokens, layout.num_suffix_tokens


def default_frame_rate(pipeline_config: Any) -> int:
    """What most families were trained on."""
    return DEFAULT_FRAME_RATE


def one_more_than_a_multiple(num_frames: int, factor: int) -> int:
    """The rule of causal VAEs: the first frame stands alone, `factor` frames share each further latent.

    Raises:
        ConfigError: not of this form; says which counts are near.
    """
    if num_frames % factor != 1 % factor:
        below = (num_frames - 1) // factor * factor + 1
        raise ConfigError(f"num_frames must be a multiple of {factor} plus 1, not {num_frames}; nearest: {below} or {below + factor}")
    return num_frames


def no_key_mask(config: Any, arguments: Mapping[str, Any]) -> None:
    """Most models mask keys, if any, by what arrives at their attention."""


def timestep(arguments: Mapping[str, Any]) -> Any:
    """The time of most models, which is 0 where the picture is done."""
    return arguments.get("timestep")


def rising(name: str) -> Callable[[Mapping[str, Any]], Any]:
    """The time of models whose argument `name` rises to 1 where the picture is done."""

    def time(arguments: Mapping[str, Any]) -> Any:
        risen = arguments.get(name)
        return None if risen is None else 1 - risen

    return time


def attention_head_dim(config: Any) -> int:
    """Under the name that most of diffusers' transformers give it."""
    return int(config.attention_head_dim)


def num_attention_heads(config: Any) -> int:
    """Under the name that most of diffusers' transformers give it."""
    return int(config.num_attention_heads)


@dataclass(frozen=True)
class ModelFamily:
    """One family: everything that is true of it and not of every model. No other folder names a family.

    Attributes:
        name: for reports and the compatibility matrix.
        transformer_classes: diffusers class names.
        layout: (model configuration, forward's named arguments) -> TokenLayout; may raise if the arguments are of an unknown form.
        self_attention: regular expression of the module paths that are self-attention (joint attention counts as self-attention).
        runs_first: regular expression of those of them that a forward runs before all others, wherever the model registers them.
        image_only: of these, the module paths whose sequence is the video or image without the text (`TokenLayout.without_text`).
        key_mask: (model configuration, forward's named arguments) -> bool `[B, S]`, which tokens are real, where the model makes a square
            mask of it in every layer anew; None where it does not.
        text_is_keys_only: queries are the image's alone, keys are those of all tokens.
        head_size: model configuration -> D of its self-attention.
        num_heads: model configuration -> heads of its self-attention; asked only where ranks share them.
        time: forward's named arguments -> a number or tensor that falls from step to step, in the scheduler's timesteps or as a share of
            its training steps; None where they hold none.
        frame_rate: pipeline configuration -> frames per second that its videos are meant to be played at.
        size_multiple: heights and widths must be a multiple of it, whatever VAE and patch ask for.
        pixels_per_token: height and width of what a token stands for, where it does not follow from VAE and patch.
        frames_to_ask: (frames wanted, frames per latent) -> the `num_frames` that makes the pipeline make exactly that many; raises
            ConfigError where nothing does.
        full_precision_vaes: class names of VAEs that lose quality in half precision and whose pipelines cast the latents to the VAE's own
            dtype.
        untrue_notices: what its pipelines log although it is not so, by name of the logger: records that hold the text are dropped.
        dispatches: its processors go through diffusers' attention dispatcher; False means they call torch's SDPA directly.
        has_processors: its attention modules have a `processor`; False means that their own forward calls torch's SDPA.
        suffix_varies: calls of one forward differ in how many tokens stand behind the video; what a call has beside prefix and video
            stands there.
        call_per_sample: its attention modules make one call for each sample of a batch.
        supported: names of the backends that make sense for it; None means every one.
        linear_layers: regular expression of the paths below a block, which is what holds a self-attention module, whose linear layers are
            attention projections or feed-forward: what quantisation serves.
        checkpoint_names: (regular expression, replacement) that turn the names of the authors' own checkpoints into those of diffusers.
        checkpoint_folders: by component, the folder in which the authors' own checkpoints keep it.
        streams: TokenLayout -> lengths of the streams that context parallelism splits apart, in self-attention's order; None: not known.
        split_plan: model configuration -> how context parallelism splits the tokens, for classes that the host has no plan of its own for:
            by path of a module, by name of an argument or number of a result, which axis of a tensor of how many axes; a bare axis is
            where the parts of the module's result are put together. None: not known.
        whole_keys: regular expression of the cross-attention modules whose keys `split_plan` leaves whole on every rank: they exchange
            nothing, and the plan comes before the host's own, which splits them.
        never_split: model configuration -> why context parallelism would be wrong for such a model; None where it is right.
        masks_stay_whole: there its masks are those of all tokens in the model's order, on every rank.
        notes: one sentence for the compatibility matrix.
    """

    name: str
    transformer_classes: tuple[str, ...]
    layout: Callable[[Any, Mapping[str, Any]], TokenLayout]
    self_attention: str
    runs_first: str = ""
    image_only: str | None = None
    key_mask: Callable[[Any, Mapping[str, Any]], Tensor | None] = no_key_mask
    text_is_keys_only: bool = False
    head_size: Callable[[Any], int] = attention_head_dim
    num_heads: Callable[[Any], int] = num_attention_heads
    time: Callable[[Mapping[str, Any]], Any] = timestep
    frame_rate: Callable[[Any], int] = default_frame_rate
    size_multiple: int = 1
    pixels_per_token: int | None = None
    frames_to_ask: Callable[[int, int], int] = one_more_than_a_multiple
    full_precision_vaes: frozenset[str] = frozenset()
    untrue_notices: Mapping[str, str] = field(default_factory=dict)
    dispatches: bool = True
    has_processors: bool = True
    suffix_varies: bool = False
    call_per_sample: bool = False
    supported: frozenset[str] | None = None
    linear_layers: str = LINEAR_LAYERS
    checkpoint_names: tuple[tuple[str, str], ...] = ()
    checkpoint_folders: Mapping[str, str] = field(default_factory=dict)
    streams: Callable[[TokenLayout], tuple[int, ...]] | None = None
    split_plan: Callable[[Any], SplitPlan] | None = None
    whole_keys: str = ""
    never_split: Callable[[Any], str | None] = lambda _: None
    masks_stay_whole: bool = False
    notes: str = ""

    def is_self_attention(self, path: str) -> bool:
        """True for the module paths that the family's backend serves."""
        return re.fullmatch(self.self_attention, path) is not None

    def is_linear_layer(self, path: str) -> bool:
        """True for the paths below a block that quantisation serves."""
        return re.fullmatch(self.linear_layers, path) is not None

    def in_running_order(self, layers: Mapping[int, str]) -> list[int]:
        """Numbers of layers, given by number and path, in the order in which a forward runs them."""
        return sorted(layers, key=lambda number: (re.fullmatch(self.runs_first, layers[number]) is None, number))

    def is_image_only(self, path: str) -> bool:
        """True for the self-attention that sees no text although other layers of the model do."""
        return self.image_only is not None and re.fullmatch(self.image_only, path) is not None


def patch_triple(config: Any) -> tuple[int, int, int]:
    """(t, h, w) from a model configuration that holds a triple, or p and perhaps `patch_size_t`."""
    patch = config.patch_size
    if isinstance(patch, Sequence):
        frames, rows, columns = patch
        return int(frames), int(rows), int(columns)
    return int(getattr(config, "patch_size_t", None) or 1), int(patch), int(patch)


def video_only(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """For models whose `hidden_states` is `(B, C, T, H, W)` and whose self-attention sees nothing else."""
    return TokenLayout(tuple(arguments["hidden_states"].shape), patch_triple(config))


def image_layout(patch_size: int, arguments: Mapping[str, Any], prefix: int = 0, suffix: int = 0) -> TokenLayout:
    """The layout of a model whose `hidden_states` are the `(B, C, H, W)` of one image, with so many tokens before and after it."""
    batch, channels, rows, columns = arguments["hidden_states"].shape
    return TokenLayout((batch, channels, 1, rows, columns), (1, patch_size, patch_size), prefix, suffix)


def text_length(arguments: Mapping[str, Any]) -> int:
    """Text tokens of a joint model: axis 1 of `encoder_hidden_states`."""
    return int(arguments["encoder_hidden_states"].shape[1])
