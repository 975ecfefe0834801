"""The `block_sparse` of vllm-omni's attention config as a configuration of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from ditattn.backends.base import AttentionBackend
from ditattn.backends.config import SparseAttentionConfig
from ditattn.errors import ConfigError
from ditattn.values import KnownKeys

__all__ = ["BlockSparseKeys", "config_of"]


class BlockSparseKeys(KnownKeys):
    """What vllm-omni's `block_sparse` hands to the attention of a layer, under its own names and defaults.

    Attributes:
        sparsity: share of key blocks to drop.
        start_step: that many first steps run densely.
        end_step: that many last steps run densely.
        precision: of the kernel; ours compute in the tensors' own type, which is "bf16" there.
        skip_layers: transformer blocks that run densely.
    """

    sparsity: float = 0.0
    start_step: int = Field(0, ge=0)
    end_step: int = Field(0, ge=0)
    precision: str = "bf16"
    skip_layers: tuple[int, ...] = ()

    @field_validator("precision")
    @classmethod
    def _check_precision(cls, value: str) -> str:
        if value != "bf16":
            raise ValueError("that is a kernel of MindIE-SD on Ascend; ditattn computes in the tensors' own type, so leave it at 'bf16'")
        return value

    def ours(self) -> dict[str, Any]:
        """The same under our names."""
        return {
            "sparsity": self.sparsity,
            "skip_first_steps": self.start_step,
            "skip_last_steps": self.end_step,
            "skip_layers": self.skip_layers,
        }


def config_of(backend: type[AttentionBackend], backend_kwargs: Mapping[str, Any] | None, keys: Mapping[str, Any]) -> SparseAttentionConfig:
    """The configuration of a layer from vllm-omni's keys and further ones of ours.

    Raises:
        UnknownKey, ConfigError: a key that neither has, or a value that cannot be honoured.
    """
    try:
        given = BlockSparseKeys.from_mapping(backend_kwargs or {})
    except ConfigError as error:
        raise type(error)(f"block_sparse: {error}") from None
    config = backend.get_config_cls().from_mapping({**keys, **given.ours()})
    assert isinstance(config, SparseAttentionConfig)
    return config
