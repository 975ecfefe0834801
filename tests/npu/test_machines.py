"""Which implementation serves on which machine, and why not another: invented SoCs and sets of installed packages."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from ditattn.backends.registry import AttentionBackendEnum as B
from ditattn.backends.registry import load_backend
from ditattn.backends.selector import backend_on
from ditattn.devices import find_device
from ditattn.devices.npu import generation_of
from ditattn.errors import BackendUnavailable, UnsupportedCall
from ditattn.ops import block_sparse_attention, dense_attention
from ditattn.ops.block_sparse_attention import ascend
from ditattn.ops.table import CallFacts, choose, choose_to_run, explain
from ditattn.packages import Package

A2, A3, A5 = "Ascend910B2", "Ascend910_9382", "Ascend950PR_9579"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EVERYTHING = ("sgl_kernel_npu", "attentions", "mindiesd")
NONE: tuple[str, ...] = ()
KEYS, GQA3 = {"needs": frozenset({"key_lengths"})}, {"needs": frozenset({"gqa"}), "group": 3}

# SoC, packages beside torch_npu, dtype, head size, further facts -> what serves a sparse call
SPARSE = [
    (A2, NONE, BF16, 128, {}, "mask_torch_npu"),
    (A2, EVERYTHING, BF16, 128, {}, "mask_torch_npu"),
    (A3, NONE, FP16, 64, {}, "mask_torch_npu"),
    (A3, NONE, BF16, 32, {}, "mask_torch_npu"),
    (A2, NONE, FP32, 128, {}, "torch"),
    (A2, NONE, BF16, 256, {}, "torch"),
    (A2, NONE, BF16, 128, KEYS, "mask_torch_npu"),
    (A2, NONE, BF16, 128, {"needs": frozenset({"causal"})}, "torch"),
    (A2, NONE, BF16, 128, GQA3, "torch"),
    (A2, EVERYTHING, BF16, 128, GQA3, "counted_sgl_kernel_npu"),
    (A2, EVERYTHING, BF16, 128, {"needs": frozenset({"other_block_size"})}, "torch"),
    (A5, NONE, FP16, 128, {}, "mask_torch_npu"),
    (A5, NONE, BF16, 128, {}, "torch"),
    (A5, ("attentions", "sgl_kernel_npu"), BF16, 128, {}, "torch"),
    (A5, ("mindiesd",), BF16, 128, {}, "mask_mindiesd"),
]

# the same, with CANN 8.5, which lacks the operator that takes a mask
SPARSE_OLD_CANN = [
    (A2, NONE, BF16, 128, {}, "torch"),
    (A2, ("attentions",), BF16, 128, {}, "index_attentions"),
    (A3, ("mindiesd",), BF16, 64, {}, "index_mindiesd"),
    (A3, ("sgl_kernel_npu",), FP16, 96, {}, "counted_sgl_kernel_npu"),
    (A2, EVERYTHING, BF16, 128, GQA3, "counted_sgl_kernel_npu"),
    (A2, EVERYTHING, BF16, 128, KEYS, "torch"),
]

LASER = [
    (A2, ("sgl_kernel_npu",), "laser_sgl_kernel_npu"),
    (A3, ("attentions",), "laser_attentions"),
    (A2, ("mindiesd",), "laser_mindiesd"),
    (A3, EVERYTHING, "laser_sgl_kernel_npu"),
]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, soc: Callable[[str], None]) -> Callable[..., None]:
    """An NPU of that name with torch_npu and those packages."""

    def invent(name: str, packages: tuple[str, ...], cann: tuple[int, int] = (9, 0)) -> None:
        soc(name)
        monkeypatch.setattr(Package, "missing", lambda self: self.module in EVERYTHING and self.module not in packages)
        monkeypatch.setattr("ditattn.ops.ascend.cann_version", lambda: cann)

    return invent


@pytest.mark.parametrize(("name", "packages", "dtype", "head_dim", "facts", "expected"), SPARSE)
def test_sparse(machine, name, packages, dtype, head_dim, facts, expected) -> None:
    machine(name, packages)
    assert choose(block_sparse_attention.TABLE, CallFacts("npu", dtype, head_dim, **facts)).name == expected


@pytest.mark.parametrize(("name", "packages", "dtype", "head_dim", "facts", "expected"), SPARSE_OLD_CANN)
def test_sparse_with_cann_8(machine, name, packages, dtype, head_dim, facts, expected) -> None:
    machine(name, packages, cann=(8, 5))
    assert choose(block_sparse_attention.TABLE, CallFacts("npu", dtype, head_dim, **facts)).name == expected


@pytest.mark.parametrize(("name", "packages", "dtype", "head_dim", "facts", "expected"), SPARSE)
def test_plain_torch_is_warned_of_and_nothing_else(machine, caplog, name, packages, dtype, head_dim, facts, expected) -> None:
    machine(name, packages)
    with caplog.at_level(logging.WARNING, "ditattn"):
        for num_keys in (8192, 32760):
            choose_to_run(block_sparse_attention.TABLE, CallFacts("npu", dtype, head_dim, **facts, num_keys=num_keys))
    assert len(caplog.records) == (expected == "torch")


def test_the_warning_names_every_reason(machine, caplog) -> None:
    machine(A5, ("attentions",))
    with caplog.at_level(logging.WARNING, "ditattn"):
        choose_to_run(block_sparse_attention.TABLE, CallFacts("npu", BF16, 128))
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(
        "block_sparse_attention runs as 'torch', which is slow on npu (npu, bfloat16, head size 128). mask_torch_npu: "
    )
    assert "load the model in float16" in message
    assert "mask_mindiesd: package 'mindiesd' is missing" in message
    assert "index_attentions, index_mindiesd, counted_sgl_kernel_npu, counted_attentions, counted_mindiesd: the operator runs on" in message


@pytest.mark.parametrize(("name", "packages", "expected"), LASER)
def test_laser(machine, name, packages, expected) -> None:
    machine(name, packages)
    assert choose(dense_attention.TABLE, CallFacts("npu", BF16, 128), dense_attention.LASER_NAMES).name == expected
    assert load_backend(B.LASER_ATTN).why_not(find_device("npu"), 128, BF16) is None


def reasons(table, dtype=BF16) -> dict[str, str | None]:
    return {v.implementation.name: v.reason for v in explain(table, CallFacts("npu", dtype, 128))}


def test_reasons_on_a5(machine) -> None:
    machine(A5, EVERYTHING)
    found = reasons(block_sparse_attention.TABLE)
    assert found["mask_mindiesd"] is None
    assert "allows bfloat16 with inner_precise 0 only" in found["mask_torch_npu"]
    assert "load the model in float16, or use mask_mindiesd (pip install mindiesd" in found["mask_torch_npu"]
    for name in ("index_attentions", "index_mindiesd", "counted_sgl_kernel_npu", "counted_attentions", "counted_mindiesd"):
        assert f"runs on Ascend A2 and A3, this is {A5} (A5): use mask_mindiesd or mask_torch_npu" in found[name]


@pytest.mark.parametrize("packages", [NONE, EVERYTHING])
def test_laser_on_a5_says_what_to_use(machine, packages) -> None:
    """Also where no package is installed: none of them would help."""
    machine(A5, packages)
    with pytest.raises(BackendUnavailable, match=r"runs on Ascend A2 and A3, this is Ascend950PR_9579 \(A5\): use fa, rain_fusion_attn"):
        backend_on(find_device("npu"), B.LASER_ATTN, 128, BF16)
    for backend in (B.FA, B.RAIN_FUSION_ATTN, B.BLOCK_SPARSE_ATTN, B.TORCH_SDPA):
        assert load_backend(backend).why_not(find_device("npu"), 128, BF16) is None


def test_cann_that_is_too_old_is_named(machine) -> None:
    machine(A2, NONE, cann=(8, 5))
    assert reasons(block_sparse_attention.TABLE)["mask_torch_npu"] == (
        "torch.ops.npu.npu_block_sparse_attention needs CANN 9.0 or newer, this is 8.5"
    )


def test_missing_providers_are_named_with_their_installation(machine) -> None:
    machine(A2, NONE)
    with pytest.raises(BackendUnavailable) as error:
        backend_on(find_device("npu"), B.LASER_ATTN, 128, BF16)
    for package, install in (
        ("sgl_kernel_npu", "build sgl-kernel-npu"),
        ("attentions", "build sgl-kernel-npu"),
        ("mindiesd", "pip install"),
    ):
        assert f"package '{package}' is missing" in str(error.value)
        assert install in str(error.value)
    assert "Possible there: torch_sdpa, fa, block_sparse_attn, rain_fusion_attn" in str(error.value)


def test_a_package_that_does_not_load_says_why(machine, monkeypatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libhccl.so: cannot open shared object file\nand more")

    machine(A2, ("mindiesd",))
    monkeypatch.setattr("ditattn.ops.ascend.importlib.import_module", broken)
    reason = ascend.INDEX_MINDIESD.probe()
    assert reason == "package 'mindiesd' is installed but does not load: libhccl.so: cannot open shared object file"


def test_too_many_tokens_for_laser(machine) -> None:
    machine(A2, EVERYTHING)
    with pytest.raises(UnsupportedCall, match="Laser takes up to 131072 tokens, not 131073"):
        choose(dense_attention.TABLE, CallFacts("npu", BF16, 128, num_keys=131073), dense_attention.LASER_NAMES)


@pytest.mark.parametrize(
    ("name", "generation"),
    [
        ("Ascend910B2", "A2"),
        ("Ascend910B4-1", "A2"),
        ("Ascend910_9382", "A3"),
        ("Ascend950PR_9579", "A5"),
        ("Ascend950DT_95A1", "A5"),
        ("Ascend910A", None),
        ("Ascend310P3", None),
        ("", None),
    ],
)
def test_generations(name: str, generation: str | None) -> None:
    assert generation_of(name) == generation


def test_facts_of_the_machine(soc) -> None:
    soc(A3)
    npu = find_device("npu")
    assert npu.device_name() == "Ascend910_9382 (A3)"
    assert npu.why_unavailable() is None


def test_no_npu_names_the_variable(monkeypatch) -> None:
    monkeypatch.setattr(torch.npu, "is_available", lambda: False)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "7")
    assert "ASCEND_RT_VISIBLE_DEVICES is '7'" in find_device("npu").why_unavailable()
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES")
    assert "ASCEND_RT_VISIBLE_DEVICES is not set" in find_device("npu").why_unavailable()


def test_the_memory_of_the_device_is_known() -> None:
    """As the stand-in for CANN says it."""
    assert find_device("npu").memory_bytes() == 8 << 30
