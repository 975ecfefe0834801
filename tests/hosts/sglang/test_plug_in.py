"""sglang's own loader finds the plug-in, and our names resolve to our classes on the platforms that our devices know."""

from __future__ import annotations

import shlex
import sys
import types
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.multimodal_gen.runtime.layers.attention.backends.attention_backend import AttentionRequirements
from sglang.multimodal_gen.runtime.layers.attention.backends.sdpa import SDPABackend
from sglang.multimodal_gen.runtime.layers.attention.selector import get_attn_backend
from sglang.multimodal_gen.runtime.platforms import AttentionBackendEnum, current_platform
from sglang.multimodal_gen.runtime.platforms.cpu import CpuPlatform
from sglang.multimodal_gen.runtime.platforms.cuda import CudaPlatformBase
from sglang.multimodal_gen.runtime.platforms.npu import NPUPlatformBase
from sglang.multimodal_gen.runtime.platforms.plugins import GENERAL_PLUGINS_GROUP, HookRegistry
from sglang.multimodal_gen.runtime.server_args import ServerArgs
from sglang.multimodal_gen.runtime.utils.argparse import FlexibleArgumentParser

from ditattn.backends.registry import load_backend
from ditattn.errors import BackendUnavailable, ConfigError, UnknownKey, UnsupportedHeadSize
from ditattn.hosts.sglang.config import NAMES
from ditattn.hosts.sglang.plug_in import CLASSES, TARGETS, choose_class, plug_in

Serve = Callable[..., Any]
PAGE = Path(__file__).resolve().parents[3] / "docs" / "hosts" / "sglang.md"


def backend_of(name: str) -> Any:
    """As a layer asks for it."""
    return get_attn_backend(64, torch.bfloat16, selected_attention_backend=AttentionBackendEnum[name.upper()])


def path_on(platform: Any, name: str | None, head_size: int = 64) -> str:
    member = None if name is None else AttentionBackendEnum[name.upper()]
    path: str = platform.get_attn_backend_cls_str(member, head_size, torch.bfloat16)
    return path


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine that has every device: what would be asked of it."""
    asked: list[Any] = []
    monkeypatch.setattr("ditattn.hosts.sglang.plug_in.backend_on", lambda device, *args: asked.append((device.device_type, *args)))
    return asked


def test_the_entry_point_is_declared_once() -> None:
    [point] = [point for point in entry_points(group=GENERAL_PLUGINS_GROUP) if point.dist.name == "ditattn"]
    assert point.name == "ditattn"
    assert point.load() is plug_in


@pytest.mark.usefixtures("plugged")
def test_hooks_are_applied_once_however_often_the_plug_in_is_called() -> None:
    plug_in()
    for target in TARGETS:
        assert target in HookRegistry._patched
        assert [hook for _, hook, _ in HookRegistry._hooks[target]] == [choose_class]
    for platform in (CpuPlatform, CudaPlatformBase, NPUPlatformBase):
        assert isinstance(vars(platform)["get_attn_backend_cls_str"], classmethod)


@pytest.mark.parametrize("name", NAMES)
def test_our_names_resolve_to_ours(serve: Serve, name: str) -> None:
    assert current_platform.is_cpu()
    serve()
    backend = backend_of(name)
    assert backend.__module__ == "ditattn.hosts.sglang.classes"
    assert backend.get_enum() is AttentionBackendEnum[name.upper()]
    assert backend.get_supported_head_sizes() == load_backend(name).get_supported_head_sizes()
    # the stage asks again, and gets the same class
    assert backend_of(name) is backend


def test_every_other_name_is_answered_by_sglang(serve: Serve) -> None:
    serve()
    assert backend_of("torch_sdpa") is SDPABackend
    assert backend_of("sage_attn") is SDPABackend
    assert path_on(CpuPlatform, None).endswith("SDPABackend")
    with pytest.raises(ValueError, match="Invalid attention backend for cuda"):
        path_on(CudaPlatformBase, "no_attention")


@pytest.mark.parametrize("name", NAMES)
def test_on_cuda_where_sglang_refuses(serve: Serve, name: str, checked: list[Any]) -> None:
    serve()
    assert path_on(CudaPlatformBase, name) == CLASSES[name]
    assert checked == [("cuda", name, 64, torch.bfloat16)]
    original = vars(CudaPlatformBase)["get_attn_backend_cls_str"].__func__.__wrapped__
    with pytest.raises(ValueError, match="Invalid attention backend"):
        original(CudaPlatformBase, AttentionBackendEnum[name.upper()], 64, torch.bfloat16)


def test_a_device_that_is_not_there_is_named(serve: Serve) -> None:
    serve()
    with pytest.raises(BackendUnavailable, match="'rain_fusion_attn' was asked for on cuda"):
        path_on(CudaPlatformBase, "rain_fusion_attn")


@pytest.mark.parametrize("name", NAMES)
def test_on_an_npu_where_theirs_cannot_be_imported_or_ours_is_asked_for(
    serve: Serve, name: str, checked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve()
    assert "attentions" not in sys.modules
    assert path_on(NPUPlatformBase, name) == CLASSES[name]
    monkeypatch.setitem(sys.modules, "attentions", types.ModuleType("attentions"))
    assert path_on(NPUPlatformBase, name).startswith("sglang.")
    serve(backend=name)
    assert path_on(NPUPlatformBase, name) == CLASSES[name]
    assert checked == [("npu", name, 64, torch.bfloat16)] * 2
    for module in NAMES:
        # imported with the stand-in, which the next test does not have
        sys.modules.pop(f"sglang.multimodal_gen.runtime.layers.attention.backends.{module}", None)


def test_wrong_keys_are_refused_where_a_layer_is_built(serve: Serve) -> None:
    serve(sparcity=0.5)
    with pytest.raises(ValueError, match=r"rain_fusion_attn: unknown key 'sparcity'; did you mean 'sparsity'\? Known keys: .*backend"):
        backend_of("rain_fusion_attn")
    with pytest.raises(UnknownKey, match="laser_attn: unknown key 'sparcity'; did you mean 'backend'"):
        path_on(CpuPlatform, "laser_attn")
    serve(bakend="permuted_sparse_attn")
    with pytest.raises(UnknownKey, match="did you mean 'backend'"):
        path_on(CpuPlatform, "rain_fusion_attn")
    serve(sparsity=1.5)
    with pytest.raises(ConfigError, match="sparsity"):
        path_on(CpuPlatform, "rain_fusion_attn")
    serve(backend="permuted_sparse_attn")
    with pytest.raises(ConfigError, match="ask for it under rain_fusion_attn"):
        path_on(CpuPlatform, "laser_attn")


def test_head_sizes_are_checked_where_a_layer_is_built(serve: Serve) -> None:
    serve()
    with pytest.raises(UnsupportedHeadSize, match="not 136"):
        path_on(CpuPlatform, "laser_attn", head_size=136)


def test_packed_sequences_of_several_lengths_are_refused_by_name(serve: Serve) -> None:
    serve()
    with pytest.raises(ValueError, match="'rain_fusion_attn' does not implement packed varlen attention"):
        get_attn_backend(
            64,
            torch.bfloat16,
            selected_attention_backend=AttentionBackendEnum.RAIN_FUSION_ATTN,
            attention_requirements=AttentionRequirements(packed_varlen=True),
        )


def test_documented_commands_are_sglangs(serve: Serve) -> None:
    serve()
    parser = ServerArgs.add_cli_args(FlexibleArgumentParser())
    commands = [shlex.split(line) for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("sglang generate")]
    assert len(commands) == 2
    for command in commands:
        # of another parser, which knows the parameters of a request
        place = command.index("--prompt")
        read = parser.parse_args(command[2:place] + command[place + 2 :])
        keys = ServerArgs._parse_attention_backend_config(None, read.attention_backend_config)
        serve(read.attention_backend, **keys)
        assert path_on(CpuPlatform, read.attention_backend) == CLASSES[read.attention_backend]
