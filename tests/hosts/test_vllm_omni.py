"""The adapter to vllm-omni without vllm-omni: keys, tokens, and a layer with somebody else's dense attention. The rest is in tests/omni."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ditattn.backends.config import RainFusionAttentionConfig
from ditattn.backends.registry import load_backend
from ditattn.backends.sparse import Reason
from ditattn.errors import BackendUnavailable
from ditattn.hosts.vllm_omni import BlockSparseKeys, Layer, Run, Tokens, register
from ditattn.hosts.vllm_omni.block_sparse import config_of
from ditattn.hosts.vllm_omni.environment import SWITCH
from ditattn.hosts.vllm_omni.layer import layer_number
from ditattn.models import TokenLayout
from ditattn.runtime.step import Step

RAIN_FUSION = load_backend("rain_fusion_attn")


def test_their_keys_become_ours() -> None:
    given = {"sparsity": 0.6, "start_step": 3, "end_step": 1, "precision": "bf16", "skip_layers": [0, 2, 3]}
    config = config_of(RAIN_FUSION, given, {"token_order": "raster"})
    assert isinstance(config, RainFusionAttentionConfig)
    assert (config.sparsity, config.skip_first_steps, config.skip_last_steps, config.skip_layers) == (0.6, 3, 1, "0,2,3")
    assert config.token_order == "raster"


def test_every_one_of_their_keys_has_a_meaning_here() -> None:
    assert set(BlockSparseKeys.model_fields) == {"sparsity", "start_step", "end_step", "precision", "skip_layers"}


@pytest.mark.parametrize(("prefix", "number"), [("blocks.12.attn1", 12), ("attn", None), ("", None), ("stage.1.blocks.12.attn", None)])
def test_a_layers_number_is_the_only_one_in_its_path(prefix: str, number: int | None) -> None:
    assert layer_number(prefix) == number


@pytest.mark.parametrize("value", [None, "", "0", " 0 "])
def test_without_the_switch_nothing_of_theirs_is_imported(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(SWITCH, value)
    # an import would raise
    monkeypatch.setitem(sys.modules, "vllm_omni", None)
    register()


def test_a_version_without_the_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = SimpleNamespace(DiffusionAttentionBackendEnum=SimpleNamespace(__members__={}), register_diffusion_backend=None)
    monkeypatch.setitem(sys.modules, "vllm_omni.diffusion.attention.backends.registry", registry)
    monkeypatch.setenv(SWITCH, "rain_fusion_attn")
    with pytest.raises(BackendUnavailable, match=r"no attention backend RAINFUSION_ATTN: pip install"):
        register()


@pytest.mark.parametrize(
    ("video", "mask", "extra", "tokens"),
    [
        ({"latent_grid": (2, 8, 8)}, None, {}, (0, 128)),
        ({"latent_grid": (2, 4, 8), "prefix_len": 64}, None, {}, (64, 128)),
        ({"latent_grid": (2, 4, 8)}, None, {"max_seqlen_q": 64}, (0, 64)),
        ({"latent_grid": (2, 4, 8), "used_len": 100}, None, {}, (0, 100)),
        ({"latent_grid": (2, 4, 8)}, None, {"valid_kv_length": 100}, Reason.TOKEN_COUNT),
        ({"latent_grid": (2, 4, 8)}, None, {}, Reason.TOKEN_COUNT),
        ({"latent_grid": (4, 8, 8)}, None, {}, Reason.TOKEN_COUNT),
        ({}, None, {}, Reason.UNKNOWN_GEOMETRY),
        ({"latent_grid": (2, 8, 8)}, torch.ones(1, 1, 1, 128), {}, "mask that is not key padding"),
    ],
)
def test_which_tokens_of_a_call_are_a_video(video: dict[str, Any], mask: Any, extra: dict[str, int], tokens: Any) -> None:
    layout = SimpleNamespace(**{"prefix_len": 0, "latent_grid": None, "used_len": None, "video_spans": (), **video})
    metadata = SimpleNamespace(video_layout=layout, attn_mask=mask, full_attn_spans=None, extra=extra)
    query = torch.zeros(1, 128, 1, 64)
    found = Tokens.of(query, query, metadata)
    if isinstance(tokens, str):
        assert found == Tokens(why_dense=tokens)
        return
    assert found.layout is not None
    assert (found.layout.num_prefix_tokens, found.used) == tokens


def test_dense_calls_are_the_hosts_and_sparse_ones_are_not() -> None:
    config = config_of(RAIN_FUSION, {"sparsity": 0.5, "start_step": 1}, {"min_tokens": 0})
    layer = Layer(RAIN_FUSION, config, Run(), num_heads=1, head_size=64, prefix="blocks.0.attn")
    query, key, value = torch.randn(3, 1, 1024, 1, 64)
    tokens = Tokens(TokenLayout((1, 1, 4, 16, 16), (1, 1, 1)), 1024)
    dense = torch.full_like(query, 7.0)
    assert torch.equal(layer.attend(query, key, value, tokens, Step(0, None, "none"), lambda: dense), dense)
    out = layer.attend(query, key, value, tokens, Step(1, None, "none"), lambda: dense)
    assert out.isfinite().all()
    assert not (out == 7).any()


def test_a_run_begins_anew_where_the_steps_do_and_not_between_requests_that_take_turns() -> None:
    run = Run()
    for index in (0, 1, 2, 0, 3, 1, 4):
        run.enter(Step(index, None, "none"))
    assert run.number == 1
