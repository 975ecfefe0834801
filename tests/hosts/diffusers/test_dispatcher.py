"""The private names of diffusers that the adapter stands on. A failure here says what moved, before users meet an AttributeError."""

from __future__ import annotations

import inspect
from enum import Enum
from typing import Any

import diffusers
import pytest
from diffusers import WanTransformer3DModel
from diffusers.hooks import HookRegistry, ModelHook, hooks
from diffusers.hooks.context_parallel import EquipartitionSharder
from diffusers.models import attention_dispatch
from diffusers.models._modeling_parallel import TensorParallelConfig
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from packaging import version
from torch import nn

from ditattn.hosts.diffusers.dispatcher import add_private_backend, dispatched_attention
from ditattn.models import MODELS

REGISTRY = attention_dispatch._AttentionBackendRegistry
MESHES = ("_flattened_mesh", "_ring_mesh", "_ulysses_mesh")
NAMES = attention_dispatch.AttentionBackendName


# classes that came after the oldest release that is supported
SINCE = {
    "AnyFlowTransformer3DModel": "0.39",
    "Flux3Transformer2DModel": "0.42",
    "JoyImageEditPlusTransformer3DModel": "0.40",
    "JoyImageEditTransformer3DModel": "0.39",
    "Kandinsky6Transformer3DModel": "0.42",
    "Krea2Transformer2DModel": "0.39",
    "MiniMaxH3Transformer3DModel": "0.40",
    "MotifVideoTransformer3DModel": "0.39",
    "QwenImage21Transformer2DModel": "0.41",
}


def moved(what: str) -> str:
    return f"diffusers {diffusers.__version__} changed {what}, which ditattn.hosts.diffusers relies on"


@pytest.mark.parametrize("name", ["_member_map_", "_member_names_", "_value2member_map_"])
def test_backend_names_are_an_enum_with_its_three_maps(name: str) -> None:
    assert issubclass(NAMES, str), moved("AttentionBackendName: it is no str any more")
    assert issubclass(NAMES, Enum), moved("AttentionBackendName: it is no Enum any more")
    assert isinstance(getattr(NAMES, name, None), (dict, list)), moved(f"AttentionBackendName.{name}")


@pytest.mark.parametrize(("name", "kind"), [("_backends", dict), ("_constraints", dict), ("_supported_arg_names", dict)])
def test_the_registry_has_its_tables(name: str, kind: type) -> None:
    table = getattr(REGISTRY, name, None)
    assert isinstance(table, kind), moved(f"_AttentionBackendRegistry.{name}")
    assert NAMES.NATIVE in table, moved(f"the keys of _AttentionBackendRegistry.{name}")


def test_the_registry_has_a_process_wide_backend() -> None:
    assert isinstance(getattr(REGISTRY, "_active_backend", None), NAMES), moved("_AttentionBackendRegistry._active_backend")


def test_the_dispatcher_hands_over_nothing_that_we_do_not_list() -> None:
    asked = set(inspect.signature(attention_dispatch.dispatch_attention_fn).parameters) - {"backend", "attention_kwargs", "parallel_config"}
    ours = set(inspect.signature(dispatched_attention).parameters)
    assert asked <= ours, moved(f"dispatch_attention_fn: new arguments {sorted(asked - ours)} would be dropped in silence")


def test_the_dispatcher_takes_a_member_that_its_enum_does_not_know() -> None:
    import torch

    member, remove = add_private_backend("contract")
    try:
        x = torch.randn(1, 6, 2, 8)
        out = attention_dispatch.dispatch_attention_fn(x, x, x, backend=member)
        native = attention_dispatch.dispatch_attention_fn(x, x, x)
    finally:
        remove()
    torch.testing.assert_close(out, native, msg=moved("dispatch_attention_fn: a private member does not reach its function"))
    assert str(member.value) not in NAMES._value2member_map_
    assert member not in REGISTRY._backends


def test_hooks_receive_the_cache_context() -> None:
    received: list[Any] = []

    class Sink(hooks.StateManager):
        def set_context(self, context: Any) -> None:
            received.append(context)

    class Listener(ModelHook):
        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()
            self.sink = Sink(hooks.BaseState)

        def reset_state(self, module: nn.Module) -> nn.Module:
            received.append("reset")
            return module

    model = _tiny_model()
    registry = HookRegistry.check_if_exists_or_initialize(model)
    assert model._diffusers_hook is registry, moved("the attribute _diffusers_hook")
    registry.hooks["listener"] = Listener()
    registry._hook_order.insert(0, "listener")
    registry._fn_refs.insert(0, hooks.HookFunctionReference())
    with model.cache_context("cond"):
        pass
    names = [getattr(context, "name", context) for context in received]
    assert names == ["cond", None], moved("cache_context(): a stateful hook with a StateManager does not receive it")
    model._reset_stateful_cache()
    assert received[-1] == "reset", moved("_reset_stateful_cache(): reset_state() of a stateful hook is not called")


def test_another_hook_can_come_and_go_above_a_listening_one() -> None:
    model = _tiny_model()
    before = dict(vars(model))
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.hooks["listener"] = ModelHook()
    registry._hook_order.insert(0, "listener")
    registry._fn_refs.insert(0, hooks.HookFunctionReference())
    registry.register_hook(ModelHook(), "other")
    registry.remove_hook("other", recurse=False)
    assert registry._hook_order == ["listener"], moved("HookRegistry.remove_hook")
    assert vars(model)["forward"] == type(model).forward.__get__(model), moved("HookRegistry.remove_hook: forward is not restored")
    assert set(vars(model)) - set(before) == {"_diffusers_hook", "forward"}


def test_processors_of_dispatching_families_choose_their_backend_by_attribute() -> None:
    from diffusers.models.transformers import (
        transformer_flux,
        transformer_hunyuan_video,
        transformer_ltx,
        transformer_qwenimage,
        transformer_wan,
    )

    processors = (
        transformer_wan.WanAttnProcessor,
        transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0,
        transformer_flux.FluxAttnProcessor,
        transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0,
        transformer_ltx.LTXVideoAttnProcessor,
    )
    for cls in processors:
        assert hasattr(cls, "_attention_backend"), moved(f"{cls.__name__}._attention_backend")
        assert hasattr(cls, "_parallel_config"), moved(f"{cls.__name__}._parallel_config")


@pytest.mark.parametrize("name", [name for family in MODELS for name in family.transformer_classes])
def test_every_family_names_a_class_that_exists(name: str) -> None:
    if version.parse(diffusers.__version__) < version.parse(SINCE.get(name, "0.38")):
        assert not hasattr(diffusers, name), f"{name} is older than this test says"
        pytest.skip(f"{name} came with diffusers {SINCE[name]}")
    assert inspect.isclass(getattr(diffusers, name, None)), moved(f"{name}: there is no such class")


def test_context_parallelism_has_the_names_that_its_exchange_stands_on() -> None:
    assert isinstance(REGISTRY._supports_context_parallel, set), moved("_AttentionBackendRegistry._supports_context_parallel")
    exchange = inspect.signature(attention_dispatch._templated_context_parallel_attention).parameters
    assert {"forward_op", "backward_op", "_parallel_config"} <= set(exchange), moved("_templated_context_parallel_attention")
    config = vars(diffusers.ContextParallelConfig(ulysses_degree=2))
    for name in ("ulysses_degree", "ring_degree", "ulysses_anything", "ring_anything", "_ring_local_rank", "_ulysses_local_rank", *MESHES):
        assert name in config, moved(f"ContextParallelConfig.{name}")
    assert WanTransformer3DModel._parallel_config is None, moved("ModelMixin._parallel_config")
    assert "_mesh" in vars(TensorParallelConfig()), moved("TensorParallelConfig._mesh")
    assert "_parallel_config" in vars(HunyuanVideoAttnProcessor2_0), moved("HunyuanVideoAttnProcessor2_0._parallel_config")
    assert hasattr(attention_dispatch.SeqAllToAllDim, "apply"), moved("SeqAllToAllDim")
    assert list(inspect.signature(EquipartitionSharder.unshard).parameters) == ["tensor", "dim", "mesh"], moved("EquipartitionSharder")


def _tiny_model() -> WanTransformer3DModel:
    return WanTransformer3DModel(num_attention_heads=1, attention_head_dim=12, text_dim=4, freq_dim=4, ffn_dim=4, num_layers=1)
