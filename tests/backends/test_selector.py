"""Which backend is chosen, and the errors of those that cannot be."""

from __future__ import annotations

import pytest
import torch

from ditattn import AttentionBackendEnum, BackendUnavailable, force_attn_backend, get_attn_backend
from ditattn.backends.selector import ENVIRONMENT_VARIABLE, select_backend
from ditattn.errors import UnknownBackend, UnsupportedHeadSize, UnsupportedModel

B = AttentionBackendEnum
NAMED = {
    "forced": "fa",
    "component_backends": {"transformer_2": "laser_attn"},
    "pipeline_backend": "rain_fusion_attn",
    "environment": {ENVIRONMENT_VARIABLE: "block_sparse_attn"},
}


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        ([], B.FA),
        (["forced"], B.LASER_ATTN),
        (["forced", "component_backends"], B.RAIN_FUSION_ATTN),
        (["forced", "component_backends", "pipeline_backend"], B.BLOCK_SPARSE_ATTN),
        (["forced", "component_backends", "pipeline_backend", "environment"], None),
    ],
)
def test_priority(without: list[str], expected: B | None) -> None:
    arguments = {name: value for name, value in NAMED.items() if name not in without}
    assert select_backend(component="transformer_2", **arguments).backend == expected


def test_a_component_name_counts_for_that_component_only() -> None:
    assert (
        select_backend(component="transformer", component_backends={"transformer_2": "fa"}, pipeline_backend="laser_attn").backend
        == B.LASER_ATTN
    )


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert get_attn_backend(64, torch.float32).name == B.TORCH_SDPA


def test_environment_and_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "rain_fusion_attn")
    assert get_attn_backend(64, torch.float32).name == B.RAIN_FUSION_ATTN
    with force_attn_backend("laser_attn"):
        assert get_attn_backend(64, torch.float32, pipeline_backend="fa").name == B.LASER_ATTN
        with force_attn_backend(None):
            assert get_attn_backend(64, torch.float32, pipeline_backend="fa").name == B.FA
    assert get_attn_backend(64, torch.float32).name == B.RAIN_FUSION_ATTN


def test_a_wrong_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "rain")
    with pytest.raises(UnknownBackend, match="rain"):
        get_attn_backend(64, torch.float32)


def test_a_family_that_does_not_support_it_lists_what_it_supports() -> None:
    with pytest.raises(
        UnsupportedModel, match=r"Toy does not support 'rain_fusion_attn' \(named for the pipeline\); it supports fa, torch_sdpa"
    ):
        get_attn_backend(64, torch.float32, pipeline_backend="rain_fusion_attn", supported={B.FA, B.TORCH_SDPA}, model="Toy")


def test_head_size() -> None:
    with pytest.raises(UnsupportedHeadSize, match=r"8, 16, \.\.\. 128, not 136"):
        get_attn_backend(136, torch.float32, pipeline_backend="laser_attn")
    assert get_attn_backend(136, torch.float32).name == B.TORCH_SDPA


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_fallback_from_an_unavailable_device() -> None:
    with pytest.raises(BackendUnavailable, match=r"'rain_fusion_attn' was asked for on cuda.*CUDA.*Possible there: none"):
        get_attn_backend(64, torch.float32, device="cuda", pipeline_backend="rain_fusion_attn")
