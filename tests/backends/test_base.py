"""The names and classes that users and hosts see."""

from __future__ import annotations

import pytest

from ditattn import AttentionBackendEnum
from ditattn.backends.base import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder
from ditattn.backends.registry import load_backend
from ditattn.errors import UnknownBackend


def test_names() -> None:
    assert [str(backend) for backend in AttentionBackendEnum] == [
        "torch_sdpa",
        "fa",
        "laser_attn",
        "block_sparse_attn",
        "rain_fusion_attn",
        "permuted_sparse_attn",
    ]


def test_which_are_sparse() -> None:
    """The original marks Laser as sparse by mistake."""
    assert [backend.name for backend in AttentionBackendEnum if backend.is_sparse] == [
        "BLOCK_SPARSE_ATTN",
        "RAIN_FUSION_ATTN",
        "PERMUTED_SPARSE_ATTN",
    ]


def test_parse() -> None:
    assert AttentionBackendEnum.parse("Rain_Fusion_Attn") is AttentionBackendEnum.RAIN_FUSION_ATTN
    assert AttentionBackendEnum.parse(AttentionBackendEnum.FA) is AttentionBackendEnum.FA
    with pytest.raises(UnknownBackend, match="no attention backend 'rainfusion'; did you mean 'rain_fusion_attn'"):
        AttentionBackendEnum.parse("rainfusion")


@pytest.mark.parametrize("backend", list(AttentionBackendEnum), ids=str)
def test_every_backend_has_its_four_classes(backend: AttentionBackendEnum) -> None:
    cls = load_backend(backend)
    assert issubclass(cls, AttentionBackend)
    assert cls.get_enum() is backend
    assert cls.name == backend
    assert issubclass(cls.get_impl_cls(), AttentionImpl)
    assert issubclass(cls.get_metadata_cls(), AttentionMetadata)
    assert issubclass(cls.get_builder_cls(), AttentionMetadataBuilder)
    metadata = cls.get_builder_cls()().build(current_timestep=3, raw_latent_shape=(1, 16, 5, 32, 32), patch_size=(1, 2, 2))
    assert isinstance(metadata, cls.get_metadata_cls())
    assert metadata.current_timestep == 3
    sizes = cls.get_supported_head_sizes()
    assert sizes == (list(range(8, 129, 8)) if backend is AttentionBackendEnum.LASER_ATTN else [])
