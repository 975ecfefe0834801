"""What runs on this machine and on invented ones."""

from __future__ import annotations

import sys

import pytest
import torch

from ditattn import AttentionBackendEnum, BackendUnavailable
from ditattn.backends import laser_attn
from ditattn.backends.fa import FABackend
from ditattn.backends.laser_attn import LaserAttentionBackend
from ditattn.backends.registry import BACKENDS, DEFAULT_BACKEND, load_backend
from ditattn.backends.selector import backend_on
from ditattn.devices import DEVICES, Device, find_device
from ditattn.errors import UnknownBackend, UnsupportedHeadSize
from ditattn.packages import TORCH_NPU, Package

B = AttentionBackendEnum


def test_cpu_serves_every_backend() -> None:
    cpu = find_device("cpu")
    for name in B:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert backend_on(cpu, name, 64, dtype).name == name
    assert cpu.device_name()


@pytest.mark.parametrize("device", DEVICES)
def test_no_name_gives_an_exact_backend(device: str) -> None:
    found = backend_on(find_device(device), None, 64, torch.float32)
    assert found.name == DEFAULT_BACKEND
    assert not found.is_sparse


@pytest.mark.skipif("torch_npu" in sys.modules, reason="torch_npu is installed")
@pytest.mark.parametrize("backend", list(B), ids=str)
def test_npu_without_its_packages_names_each_of_them(backend: B) -> None:
    with pytest.raises(BackendUnavailable) as error:
        backend_on(find_device("npu"), backend, 64, torch.bfloat16)
    text = str(error.value)
    assert isinstance(error.value, ImportError)
    assert "package 'torch_npu' is missing (PyTorch on Ascend NPUs): pip install torch-npu" in text
    for package, install in (("attentions", "build sgl-kernel-npu from source"), ("mindiesd", "pip install mindiesd")):
        assert (f"or package '{package}' is missing" in text) is (backend is B.LASER_ATTN)
        assert (install in text) is (backend is B.LASER_ATTN)


@pytest.mark.parametrize("present", [("sgl_kernel_npu",), ("sgl_kernel_npu", "attentions", "mindiesd")])
def test_one_laser_package_is_enough(present: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Package, "missing", lambda self: self.module not in present)
    assert LaserAttentionBackend.why_not(find_device("npu")) == TORCH_NPU.sentence()


class Invented(Device):
    """A device on which Laser lacks one package of two, and FlashAttention takes one dtype."""

    device_type = "invented"


@pytest.fixture
def _needs(monkeypatch: pytest.MonkeyPatch) -> None:
    magic = (Package("no_such_package_here", "magic", "pip install magic"), Package("json", "text", "none"))
    monkeypatch.setattr(LaserAttentionBackend, "packages", {"invented": magic})
    monkeypatch.setattr(FABackend, "dtypes", {"invented": (torch.bfloat16,)})


@pytest.mark.usefixtures("_needs")
def test_errors_say_what_was_asked_found_and_would_work() -> None:
    with pytest.raises(BackendUnavailable) as error:
        backend_on(Invented(), "laser_attn", 64, torch.float32)
    assert str(error.value) == (
        "attention backend 'laser_attn' was asked for on invented: package 'no_such_package_here' is missing (magic): pip install magic. "
        "Possible there: torch_sdpa, block_sparse_attn, rain_fusion_attn, permuted_sparse_attn"
    )
    with pytest.raises(BackendUnavailable, match="takes bfloat16, not float32"):
        backend_on(Invented(), "fa", 64, torch.float32)
    with pytest.raises(UnsupportedHeadSize, match="not 136"):
        backend_on(find_device("cpu"), "laser_attn", 136, torch.float32)
    with pytest.raises(UnknownBackend, match="flash"):
        backend_on(Invented(), "flash", 64, torch.float32)


def test_asking_imports_nothing() -> None:
    classes = [load_backend(name) for name in BACKENDS]
    before = set(sys.modules)
    for backend in classes:
        backend.why_not(Invented())
        backend.why_not(find_device("npu"))
    assert {name for name in set(sys.modules) - before if "npu" in name or "attentions" in name} == set()


def test_other_devices_get_what_pure_torch_can_do() -> None:
    meta = find_device("meta")
    assert meta.device_type == "meta"
    assert "no device of type 'meta'" in load_backend("rain_fusion_attn").why_not(meta)
    assert "no FlashAttention kernel is known" in FABackend.why_not(meta)


def test_every_unavailable_backend_has_a_reason() -> None:
    for device in DEVICES:
        for name in B:
            reason = load_backend(name).why_not(find_device(device))
            assert reason is None or len(reason) > 20


def test_the_facts_of_a_device_know_no_backend() -> None:
    assert not [name for name in vars(Device) if "backend" in name]
    assert laser_attn.LaserAttentionBackend.head_sizes == tuple(range(8, 129, 8))


def test_memory_is_all_of_the_machine_and_unknown_where_nothing_tells() -> None:
    found = find_device("cpu").memory_bytes()
    assert found is not None
    assert found > 2**30
    assert find_device("mps").memory_bytes() is None
