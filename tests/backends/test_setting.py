"""One value for what is asked of the attention: whose configuration it is, checked once, the same object down to the metadata."""

from __future__ import annotations

from typing import Any

import pytest

from ditattn.backends.config import DenseAttentionConfig, RainFusionAttentionConfig
from ditattn.backends.fa import FABackend
from ditattn.backends.rain_fusion_attn import RainFusionAttentionBackend
from ditattn.backends.selector import ENVIRONMENT_VARIABLE, force_attn_backend
from ditattn.backends.setting import Setting
from ditattn.errors import ConfigError, UnknownBackend, UnknownKey


def test_names_keys_and_ranges_are_checked() -> None:
    setting = Setting.parse("Rain_Fusion_Attn", {"sparsity": "0.75"}, {"transformer_2": "FA", "transformer": None})
    assert (setting.backend, setting.config_owner, dict(setting.components)) == (
        "rain_fusion_attn",
        "rain_fusion_attn",
        {"transformer_2": "fa"},
    )
    assert setting.config == RainFusionAttentionConfig(sparsity=0.75)
    assert setting.keys == {"sparsity": 0.75}
    with pytest.raises(ConfigError, match=r"rain_fusion_attn: sparsity: .*less than 1"):
        Setting.parse("rain_fusion_attn", {"sparsity": 1})
    with pytest.raises(UnknownKey, match=r"rain_fusion_attn: .*did you mean 'sparsity'"):
        Setting.parse("rain_fusion_attn", {"sparsty": 0.5})
    with pytest.raises(UnknownBackend, match="'rain'"):
        Setting.parse(None, {}, {"transformer": "rain"})


def test_the_keys_make_the_same_setting_again() -> None:
    setting = Setting.parse("block_sparse_attn", {"skip_layers": [0, 3], "skip_first_steps": "20%"})
    assert Setting.parse(setting.backend, setting.keys, setting.components) == setting
    changed = setting.with_keys(sparsity=0.5)
    assert changed.keys == {"skip_layers": "0,3", "skip_first_steps": "20%", "sparsity": 0.5}
    assert setting.keys == {"skip_layers": "0,3", "skip_first_steps": "20%"}
    with pytest.raises(ConfigError, match="sparsity"):
        setting.with_keys(sparsity=-1)


@pytest.mark.parametrize(
    ("backend", "components", "environment", "owner"),
    [
        ("fa", {"transformer_2": "rain_fusion_attn"}, "laser_attn", "fa"),
        (None, {"transformer": "rain_fusion_attn", "transformer_2": "RAIN_FUSION_ATTN"}, "laser_attn", "rain_fusion_attn"),
        (None, {"transformer": "rain_fusion_attn", "transformer_2": "fa"}, "laser_attn", "laser_attn"),
        (None, {}, "laser_attn", "laser_attn"),
        (None, {}, "", "torch_sdpa"),
    ],
)
def test_whose_configuration_it_is(
    backend: str | None, components: dict[str, Any], environment: str, owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, environment)
    assert Setting.parse(backend, {}, components).config_owner == owner


def test_nobody_knows_whose_keys_they_are() -> None:
    with pytest.raises(ConfigError, match="sparsity: which backend is this for"):
        Setting.parse(None, {"sparsity": 0.5}, {"transformer": "rain_fusion_attn", "transformer_2": "fa"})


def test_a_forced_backend_owns_what_nobody_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fa")
    with force_attn_backend("rain_fusion_attn"):
        assert Setting.parse(None, {"sparsity": 0.5}).config_owner == "rain_fusion_attn"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "rain")
    with pytest.raises(UnknownBackend, match=ENVIRONMENT_VARIABLE):
        Setting.parse(None)


def test_other_backends_run_with_their_defaults() -> None:
    setting = Setting.parse("rain_fusion_attn", {"sparsity": 0.5})
    assert setting.config_of(RainFusionAttentionBackend) is setting.config
    assert setting.config_of(FABackend) == DenseAttentionConfig()
