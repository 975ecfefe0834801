"""What a sparse backend knows of a step: the configuration and the facts of the step, and the builder that makes one of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import torch

from ditattn.backends.base import AttentionMetadata, AttentionMetadataBuilder
from ditattn.backends.config import SparseAttentionConfig, parse_layers, resolve_steps
from ditattn.errors import ConfigError
from ditattn.plan.reuse import ForwardId, ReusePolicy
from ditattn.plan.split import GatheredRows, GatheredTokens, HeadShare
from ditattn.plan.token_grids import TokenGrid
from ditattn.plan.token_order import TokenOrder

__all__ = ["SparseAttentionMetadata", "SparseAttentionMetadataBuilder", "latent_grid"]

logger = logging.getLogger("ditattn")


@dataclass(frozen=True, kw_only=True)
class SparseAttentionMetadata(AttentionMetadata):
    """One step as a sparse backend sees it: its configuration, and the facts of the step.

    The keys of the configuration are attributes here too (`metadata.sparsity`); those that depend on the step are made ready for it.

    Attributes:
        config: as it was parsed and checked, once.
        num_steps: steps of the run; None if unknown.
        latent_shape: token grid (F, Y, X) of the video, after patchify; None if unknown.
        num_prefix_tokens, num_suffix_tokens: all tokens before and after the video tokens. In an order other than "raster" only those at
            the end, behind every grid, may be padding; that is checked where the host knows the key lengths.
        further_grids: references, conditions or layers among the prefix and suffix tokens; what is in no grid is kept whole.
        gathered: where the tokens stand that several ranks gathered; None where they stand in the model's order.
        rows: which tokens the queries are, where a rank keeps some and has everybody's keys; None where it has all.
        heads: which heads of the layer a call has, where ranks share them; None where it has all.
        forward_id: run and branch of the forward; None where the host does not say, or where nothing outlasts a step.

    Examples:
        >>> import ditattn
        >>> config = ditattn.SparseAttentionConfig(sparsity=0.5, skip_first_steps="20%")
        >>> metadata = ditattn.SparseAttentionMetadata(config=config, current_timestep=4, num_steps=30, latent_shape=(13, 16, 20))
        >>> metadata.sparsity, metadata.skip_first_steps
        (0.5, 6)
    """

    config: SparseAttentionConfig
    num_steps: int | None = None
    latent_shape: tuple[int, int, int] | None = None
    num_prefix_tokens: int = 0
    num_suffix_tokens: int = 0
    further_grids: tuple[TokenGrid, ...] = ()
    gathered: GatheredTokens | None = None
    rows: GatheredRows | None = None
    heads: HeadShare | None = None
    forward_id: ForwardId | None = None

    def __getattr__(self, key: str) -> Any:
        """A key of the configuration; kept, so that the layers that share this step find it as quickly as a field."""
        config = vars(self).get("config")
        if config is None or key not in type(config).model_fields:
            raise AttributeError(f"{type(self).__name__} has no attribute '{key}'")
        return vars(self).setdefault(key, getattr(config, key))

    @cached_property
    def skip_first_steps(self) -> int | None:
        """Steps before this index run densely; None for a share of an unknown number of steps."""
        return resolve_steps(self.config.skip_first_steps, self.num_steps)

    @cached_property
    def skip_last_steps(self) -> int | None:
        """That many last steps run densely; None as above."""
        return resolve_steps(self.config.skip_last_steps, self.num_steps)

    @cached_property
    def skip_layers(self) -> frozenset[int]:
        """Layers that run densely."""
        return parse_layers(self.config.skip_layers)

    @property
    def reuse(self) -> ReusePolicy:
        """How long plans serve."""
        return ReusePolicy(self.plan_refresh_steps, self.share_plan_between_branches)

    @property
    def num_tokens(self) -> int | None:
        """Length of the whole sequence; None if the grid is unknown."""
        if self.latent_shape is None:
            return None
        frames, rows, columns = self.latent_shape
        return self.num_prefix_tokens + frames * rows * columns + self.num_suffix_tokens

    def as_stored(self, order: TokenOrder, device: torch.device) -> TokenOrder:
        """An order of the model's tokens as one of the tokens as a call has them."""
        return order if self.gathered is None else self.gathered.ordered(order, device)

    @property
    def num_last_tokens(self) -> int:
        """Tokens behind every grid."""
        assert self.num_tokens is not None
        ends = [self.num_tokens - self.num_suffix_tokens, *(grid.stop for grid in self.further_grids)]
        return self.num_tokens - max(ends)

    @property
    def whole_first_frames(self) -> bool:
        """True if the first frame of every video is kept: a grid of one frame is an image."""
        assert self.latent_shape is not None
        return self.first_frame_sink and max(self.latent_shape[0], *(grid.size[0] for grid in self.further_grids), 1) > 1


def latent_grid(raw_latent_shape: Sequence[int], patch_size: int | Sequence[int]) -> tuple[int, int, int]:
    """Token grid (F, Y, X) from a latent shape `[..., T, H, W]` and the patch of the model: (t, h, w), or p for (1, p, p).

    Raises:
        ConfigError: fewer than three axes, or a grid without tokens.
    """
    patch = (1, patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    if len(raw_latent_shape) < 3 or len(patch) != 3:
        raise ConfigError(f"need a latent shape [..., T, H, W] and a patch (t, h, w), not {tuple(raw_latent_shape)} and {patch_size}")
    frames, rows, columns = (size // p for size, p in zip(tuple(raw_latent_shape)[-3:], patch, strict=True))
    if min(frames, rows, columns) < 1:
        raise ConfigError(f"latent shape {tuple(raw_latent_shape)} is smaller than one patch {patch}")
    return frames, rows, columns


class SparseAttentionMetadataBuilder(AttentionMetadataBuilder):
    """Makes the metadata of a step. At sparsity 0 it warns once per process, not per step.

    Examples:
        >>> import ditattn
        >>> builder = ditattn.SparseAttentionMetadataBuilder()
        >>> metadata = builder.build(current_timestep=4, raw_latent_shape=(1, 16, 13, 32, 40), patch_size=(1, 2, 2), sparsity=0.5)
        >>> metadata.latent_shape
        (13, 16, 20)
    """

    metadata_cls: ClassVar[type[SparseAttentionMetadata]] = SparseAttentionMetadata
    config_cls: ClassVar[type[SparseAttentionConfig]] = SparseAttentionConfig

    warned_at_zero: ClassVar[bool] = False

    def build(
        self,
        *,
        current_timestep: int | None = None,
        raw_latent_shape: Sequence[int] | None = None,
        patch_size: int | Sequence[int] = 1,
        config: SparseAttentionConfig | None = None,
        **kwargs: Any,
    ) -> SparseAttentionMetadata:
        """Metadata of one step.

        Args:
            current_timestep: index of the step.
            raw_latent_shape: whole latent shape `[B, C, T, H, W]`; None if unknown, then every call runs densely.
            patch_size: patch of the model, (t, h, w) or p.
            config: the configuration, parsed. Callers without one give its keys instead, such as skip_first_steps=10, sparsity=0.2; then
                `min_tokens` is 0 unless given.
            kwargs: keys of the configuration, and further fields of the metadata class.

        Raises:
            ConfigError: a key outside its range; names the values of all keys.
        """
        if config is None:
            keys = {key: kwargs.pop(key) for key in list(kwargs) if key in self.config_cls.model_fields}
            config = self._parse({"min_tokens": 0, **keys})
        if config.sparsity == 0 and not SparseAttentionMetadataBuilder.warned_at_zero:
            SparseAttentionMetadataBuilder.warned_at_zero = True
            logger.warning("sparsity is 0: every block is kept, so every call runs densely")
        grid = None if raw_latent_shape is None else latent_grid(raw_latent_shape, patch_size)
        # a metadata class of another package may have fields for its keys, as sglang's have
        own = {one.name: getattr(config, one.name) for one in fields(self.metadata_cls) if one.name in type(config).model_fields}
        return self.metadata_cls(current_timestep=current_timestep, latent_shape=grid, config=config, **own, **kwargs)

    def _parse(self, keys: dict[str, Any]) -> SparseAttentionConfig:
        try:
            return self.config_cls.from_mapping(keys)
        except ConfigError as error:
            given = ", ".join(f"{key}={value}" for key, value in keys.items())
            raise type(error)(f"invalid attention metadata ({given}): {error}") from None
