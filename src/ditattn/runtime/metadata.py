"""What the attention of one denoiser may know about a step, built from its configuration and the tokens' layout."""

from __future__ import annotations

from dataclasses import replace

from ditattn.backends.base import AttentionMetadata, AttentionMetadataBuilder
from ditattn.backends.config import AttentionConfig, SparseAttentionConfig, parse_layers
from ditattn.backends.sparse import SparseAttentionMetadata
from ditattn.errors import ConfigError
from ditattn.models import TokenLayout
from ditattn.plan.reuse import ForwardId
from ditattn.runtime.split import WHOLE, RankShare
from ditattn.runtime.step import Step

__all__ = ["build_attn_metadata", "check_layers", "for_forward", "for_length", "for_sample"]


def build_attn_metadata(
    builder: AttentionMetadataBuilder,
    config: AttentionConfig,
    step: Step,
    layout: TokenLayout | None,
    share: RankShare = WHOLE,
) -> AttentionMetadata:
    """The metadata of a step; without a layout the geometry stays unknown. `share` is what a rank has of the calls."""
    if not isinstance(config, SparseAttentionConfig):
        return builder.build(current_timestep=step.index)
    # a builder of another package need not know of sequences that its models do not have
    several = {} if layout is None or not layout.further_grids else {"further_grids": layout.further_grids}
    return builder.build(
        current_timestep=step.index,
        raw_latent_shape=None if layout is None else layout.raw_latent_shape,
        patch_size=1 if layout is None else layout.patch_size,
        config=config,
        num_steps=step.num_steps,
        num_prefix_tokens=0 if layout is None else layout.num_prefix_tokens,
        num_suffix_tokens=0 if layout is None else layout.num_suffix_tokens,
        **several,
        **share.facts(),
    )


def for_forward(metadata: AttentionMetadata, forward_id: ForwardId) -> AttentionMetadata:
    """The metadata of a step as one forward of it needs it: where something outlasts a step, with its run and branch."""
    if isinstance(metadata, SparseAttentionMetadata) and metadata.config.outlasts_steps:
        return replace(metadata, forward_id=forward_id)
    return metadata


def for_length(metadata: AttentionMetadata, num_tokens: int) -> AttentionMetadata:
    """The metadata of a forward for a call of that many tokens, all those beside prefix and video behind it."""
    if not isinstance(metadata, SparseAttentionMetadata) or metadata.num_tokens in (None, num_tokens):
        return metadata
    assert metadata.num_tokens is not None
    behind = metadata.num_suffix_tokens + num_tokens - metadata.num_tokens
    return metadata if behind < 0 else replace(metadata, num_suffix_tokens=behind)


def for_sample(metadata: AttentionMetadata, sample: int, batch: int) -> AttentionMetadata:
    """The metadata of a forward for a call of one sample of a batch: where something outlasts a step, each sample has its own."""
    if isinstance(metadata, SparseAttentionMetadata) and metadata.config.outlasts_steps:
        number = metadata.forward_id.number * batch + sample
        return replace(metadata, forward_id=replace(metadata.forward_id, number=number))
    return metadata


def check_layers(config: AttentionConfig, num_layers: int, name: str) -> None:
    """Raise ConfigError if `skip_layers` names a layer that the model does not have."""
    if isinstance(config, SparseAttentionConfig):
        beyond = sorted(layer for layer in parse_layers(config.skip_layers) if layer >= num_layers)
        if beyond:
            raise ConfigError(f"skip_layers names {', '.join(map(str, beyond))}, but {name} has self-attention layers 0-{num_layers - 1}")
