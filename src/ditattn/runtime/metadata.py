"""What the attention of one denoiser may know about a step, built from its configuration and the tokens' layout."""

from __future__ import annotations

from dataclasses import replace

from ditattn.backends.base import AttentionMetadata, AttentionMetadataBuilder
from ditattn.backends.config import AttentionConfig, SparseAttentionConfig
from ditattn.backends.sparse import SparseAttentionMetadata, why_not_this_step
from ditattn.errors import ConfigError
from ditattn.models import TokenLayout
from ditattn.plan.deal import deal_rows
from ditattn.plan.reuse import NO_PLACE, ForwardId
from ditattn.runtime.split import WHOLE, RankShare
from ditattn.runtime.step import Step

__all__ = ["build_attn_metadata", "check_layers", "for_forward", "for_length", "for_sample", "with_dealt_rows"]

# layers in a message; of more it names the first and the last
MOST_LISTED = 8


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


def for_sample(metadata: AttentionMetadata, sample: int | None, batch: int) -> AttentionMetadata:
    """The metadata of a forward for a call of one sample of a batch: where something outlasts a step, each sample has its own.

    `sample` is None where nobody knows which one it is; what it keeps serves no other call then.
    """
    if isinstance(metadata, SparseAttentionMetadata) and metadata.config.outlasts_steps:
        assert metadata.forward_id is not None
        number = NO_PLACE if sample is None else metadata.forward_id.number * batch + sample
        return replace(metadata, forward_id=replace(metadata.forward_id, number=number))
    return metadata


def with_dealt_rows(metadata: AttentionMetadata, keeps_first_frame_rows: bool, device_type: str) -> SparseAttentionMetadata | None:
    """The metadata of calls before which ranks of a ring deal out the rows that keep every key; None where there is nothing to deal."""
    if not isinstance(metadata, SparseAttentionMetadata) or metadata.rows is None or not keeps_first_frame_rows:
        return None
    grid, is_short = metadata.latent_shape, (metadata.num_tokens or 0) < metadata.config.least_tokens(device_type)
    if grid is None or not metadata.whole_first_frames or is_short or why_not_this_step(metadata) is not None:
        return None
    facts = (metadata.token_order, grid, metadata.num_prefix_tokens, metadata.num_suffix_tokens, "cpu", metadata.further_grids)
    deal = deal_rows(metadata.rows.gathered, metadata.rows.parts, facts, metadata.sparsity)
    return None if deal is None else replace(metadata, rows=replace(metadata.rows, dealt=deal))


def check_layers(config: AttentionConfig, num_layers: int, name: str) -> None:
    """Raise ConfigError if a key of the configuration, such as `skip_layers`, names a layer that the model does not have."""
    named = config.named_layers() if isinstance(config, SparseAttentionConfig) else {}
    for key, layers in named.items():
        beyond = [str(layer) for layer in sorted(layers) if layer >= num_layers]
        if beyond:
            listed = beyond if len(beyond) <= MOST_LISTED else [*beyond[:2], "...", beyond[-1]]
            raise ConfigError(f"{key} names {', '.join(listed)}, but {name} has self-attention layers 0-{num_layers - 1}")
