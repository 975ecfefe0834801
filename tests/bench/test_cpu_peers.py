"""Attention of other projects on the CPU: every arm computes attention, and says why where it cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ditattn.bench import cpu_peers
from ditattn.bench.cpu_peers import PEERS
from ditattn.errors import BackendUnavailable
from judge import relative_error
from oracle import attention

BY_NAME = {peer.name: peer for peer in PEERS}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors(dtype: torch.dtype, length: int = 300, heads: int = 2, head_dim: int = 64) -> list[Tensor]:
    return [torch.randn(1, length, heads, head_dim).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BY_NAME)
def test_every_peer_computes_attention(name: str, dtype: torch.dtype) -> None:
    operands = tensors(dtype)
    try:
        call = BY_NAME[name].prepare(*operands)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    found = call()
    exact, _ = attention(*operands, scale=64**-0.5)
    assert (found.shape, found.dtype) == (operands[0].shape, dtype)
    assert relative_error(found, exact) < max(torch.finfo(dtype).eps, 2e-6)
    # once more on the same operands, as it is timed
    assert torch.equal(call(), found)


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("SDPA, flash kernel", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        ("SDPA, math kernel", "aten::_scaled_dot_product_attention_math"),
    ],
)
def test_an_arm_of_torch_runs_the_kernel_of_its_name(name: str, operation: str) -> None:
    call = BY_NAME[name].prepare(*tensors(torch.float32))
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    assert operation in {event.key for event in seen.key_averages()}


def test_onednn_leaves_its_switch_as_it_was() -> None:
    assert not torch.jit.onednn_fusion_enabled()
    with pytest.raises(BackendUnavailable, match=r"oneDNN did not fuse the call; TorchScript runs .*aten::softmax"):
        BY_NAME["oneDNN graph"].prepare(*tensors(torch.float16))
    assert not torch.jit.onednn_fusion_enabled()


@pytest.mark.parametrize(("name", "module"), [("zentorch", "zentorch"), ("vLLM", "vllm")])
def test_a_package_that_is_missing_is_named_with_what_installs_it(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendUnavailable, match=f"package '{module}' is missing .*pip install"):
        BY_NAME[name].prepare(*tensors(torch.float32))


def test_a_vllm_without_kernels_for_this_cpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        pytest.skip("vLLM's kernels are loaded into this process already")
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendUnavailable, match=rf"the vllm in .* has no {cpu_peers._vllm_kernels()}.abi3.so"):
        BY_NAME["vLLM"].prepare(*tensors(torch.float32))
