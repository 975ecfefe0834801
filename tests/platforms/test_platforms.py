"""Platforms on this machine and on invented ones."""

from __future__ import annotations

import sys

import pytest
import torch

from ditattn import AttentionBackendEnum, BackendUnavailable
from ditattn.errors import UnknownBackend, UnsupportedHeadSize
from ditattn.packages import TORCH_NPU, Package
from ditattn.platforms import PLATFORMS, get_platform
from ditattn.platforms.interface import BACKEND_PATHS, Platform
from ditattn.platforms.npu import NpuPlatform

B = AttentionBackendEnum


def test_cpu_serves_every_backend() -> None:
    platform = get_platform("cpu")
    for backend in B:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert platform.get_attn_backend_cls_str(backend, 64, dtype) == BACKEND_PATHS[backend]
    assert platform.memory_bytes() > 2**28
    assert platform.device_name()


def test_no_name_gives_the_best_dense_backend() -> None:
    for platform in (get_platform(name) for name in PLATFORMS):
        path = platform.get_attn_backend_cls_str(None, 64, torch.float32)
        assert path in BACKEND_PATHS.values()
        assert not next(b for b, p in BACKEND_PATHS.items() if p == path).is_sparse


@pytest.mark.skipif("torch_npu" in sys.modules, reason="torch_npu is installed")
@pytest.mark.parametrize("backend", list(B))
def test_npu_without_its_packages_names_each_of_them(backend: B) -> None:
    with pytest.raises(BackendUnavailable) as error:
        get_platform("npu").get_attn_backend_cls_str(backend, 64, torch.bfloat16)
    text = str(error.value)
    assert isinstance(error.value, ImportError)
    assert "package 'torch_npu' is missing (PyTorch on Ascend NPUs): pip install torch-npu" in text
    for package, install in (("attentions", "build sgl-kernel-npu from source"), ("mindiesd", "pip install mindiesd")):
        assert (f"or package '{package}' is missing" in text) is (backend is B.LASER_ATTN)
        assert (install in text) is (backend is B.LASER_ATTN)


@pytest.mark.parametrize("present", [("sgl_kernel_npu",), ("sgl_kernel_npu", "attentions", "mindiesd")])
def test_one_laser_package_is_enough(present: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Package, "missing", lambda self: self.module not in present)
    assert NpuPlatform().why_not(B.LASER_ATTN) == TORCH_NPU.sentence()


class Invented(Platform):
    """A machine with every package but one."""

    device_type = "invented"
    packages = {B.LASER_ATTN: (Package("no_such_package_here", "magic", "pip install magic"), Package("json", "text", "none"))}  # noqa: RUF012
    dtypes = {B.FA: (torch.bfloat16,)}  # noqa: RUF012


def test_errors_say_what_was_asked_found_and_would_work() -> None:
    with pytest.raises(BackendUnavailable) as error:
        Invented().get_attn_backend_cls_str("laser_attn", 64, torch.float32)
    assert str(error.value) == (
        "attention backend 'laser_attn' was asked for on invented: package 'no_such_package_here' is missing (magic): pip install magic. "
        "Possible there: torch_sdpa, block_sparse_attn, rain_fusion_attn"
    )
    with pytest.raises(BackendUnavailable, match="takes bfloat16, not float32"):
        Invented().get_attn_backend_cls_str("fa", 64, torch.float32)
    with pytest.raises(UnsupportedHeadSize, match="not 40"):
        Invented().get_attn_backend_cls_str("rain_fusion_attn", 40, torch.float32)
    with pytest.raises(UnknownBackend, match="flash"):
        Invented().get_attn_backend_cls_str("flash", 64, torch.float32)


def test_asking_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(sys.modules)
    for backend in B:
        Invented().why_not(backend)
        NpuPlatform().why_not(backend)
    assert {name for name in set(sys.modules) - before if "npu" in name or "attentions" in name} == set()


def test_other_devices_get_what_pure_torch_can_do() -> None:
    platform = get_platform("meta")
    assert platform.device_type == "meta"
    assert "no device of type 'meta'" in platform.why_not(B.RAIN_FUSION_ATTN)
    assert "no FlashAttention kernel is known" in platform.why_not(B.FA)


def test_every_unavailable_backend_has_a_reason() -> None:
    for name in PLATFORMS:
        for backend in B:
            reason = get_platform(name).why_not(backend)
            assert reason is None or len(reason) > 20
