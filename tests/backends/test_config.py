"""Configuration: three ways to write it, typed, validated, with errors that help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from ditattn.backends.config import (
    BlockSparseAttentionConfig,
    DenseAttentionConfig,
    RainFusionAttentionConfig,
    SparseAttentionConfig,
    parse_layers,
    resolve_steps,
)
from ditattn.backends.permuted_sparse_attn import PermutedSparseAttentionConfig
from ditattn.errors import ConfigError, UnknownKey
from ditattn.values import KnownKeys, parse_config

VALUES = {"sparsity": 0.5, "skip_first_steps": "20%", "skip_layers": "0-1,38", "first_frame_sink": False, "min_tokens": 0}


def test_three_ways_to_write_the_same(tmp_path: Path) -> None:
    as_json, as_yaml = tmp_path / "a.json", tmp_path / "a.yaml"
    as_json.write_text(json.dumps(VALUES))
    as_yaml.write_text("sparsity: 0.5\nskip_first_steps: 20%\nskip_layers: 0-1,38\nfirst_frame_sink: false\nmin_tokens: 0\n")
    pairs = "sparsity=0.5,skip_first_steps=20%,skip_layers=0-1,38,first_frame_sink=false,min_tokens=0"
    for text in (str(as_json), f"@{as_json}", str(as_yaml), json.dumps(VALUES), pairs):
        assert parse_config(text) == VALUES
    assert parse_config("  ") == {}


def test_defaults_save_something() -> None:
    block_sparse, rain_fusion = BlockSparseAttentionConfig(), RainFusionAttentionConfig()
    for config in (block_sparse, rain_fusion, PermutedSparseAttentionConfig()):
        assert (config.preset, config.sparsity, config.skip_first_steps, config.skip_last_steps) == ("balanced", 0.75, "auto", 0)
        assert (config.skip_layers, config.min_tokens, config.first_frame_sink) == ("", "auto", True)
    assert (block_sparse.token_order, rain_fusion.token_order) == ("raster", "tile")
    assert block_sparse.threshold == 1


def test_how_short_is_short_depends_on_the_device() -> None:
    config = RainFusionAttentionConfig()
    assert (config.least_tokens("cpu"), config.least_tokens("cuda"), config.least_tokens("npu")) == (4096, 16384, 4096)
    assert RainFusionAttentionConfig(min_tokens=700).least_tokens("cuda") == 700
    with pytest.raises(ConfigError, match=r"^min_tokens: Input should be a valid integer.*; or 'auto' \(got 'some'\)$"):
        RainFusionAttentionConfig.from_mapping({"min_tokens": "some"})
    with pytest.raises(ConfigError, match=r"^min_tokens: Input should be greater than or equal to 0; or 'auto' \(got -1\)$"):
        RainFusionAttentionConfig.from_mapping({"min_tokens": -1})


@pytest.mark.parametrize("config_cls", [BlockSparseAttentionConfig, RainFusionAttentionConfig, PermutedSparseAttentionConfig])
def test_a_preset_stands_for_what_is_not_given(config_cls: type[SparseAttentionConfig]) -> None:
    ascend = config_cls.from_mapping({"preset": "ascend"})
    assert (ascend.sparsity, ascend.skip_first_steps) == (0.2, 10)
    assert ascend.model_dump(exclude_unset=True) == {"preset": "ascend"}
    mixed = config_cls.from_mapping({"preset": "fast", "sparsity": 0.8})
    assert mixed.sparsity == 0.8
    # what a record holds makes the same configuration again
    for config in (ascend, mixed):
        assert config_cls.from_mapping(config.model_dump()) == config
    sparsities = [config_cls.from_mapping({"preset": name}).sparsity for name in ("ascend", "quality", "balanced", "fast")]
    assert sparsities == sorted(set(sparsities))
    with pytest.raises(ConfigError, match="preset: Input should be 'quality', 'balanced', 'fast' or 'ascend'"):
        config_cls.from_mapping({"preset": "fst"})
    with pytest.raises(UnknownKey, match="did you mean 'preset'"):
        config_cls.from_mapping({"presett": "fast"})


def test_a_preset_names_every_key_that_it_has_a_default_for() -> None:
    """Else the default of the class would stand beside the values of the preset."""
    for name, keys in SparseAttentionConfig.presets.items():
        assert set(keys) == {"sparsity", "skip_first_steps"}, name
    balanced = SparseAttentionConfig.presets["balanced"]
    assert balanced == {key: SparseAttentionConfig.model_fields[key].default for key in balanced}


@pytest.mark.parametrize(("num_steps", "dense"), [(1, 1), (4, 1), (8, 1), (9, 2), (24, 5), (50, 10), (None, None)])
def test_the_automatic_first_steps(num_steps: int | None, dense: int | None) -> None:
    assert resolve_steps("auto", num_steps) == dense


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere.json", "nowhere.json does not exist"),
        ("@nowhere.yaml", "nowhere.yaml does not exist"),
        ('{"sparsity": 0.5', "not valid JSON"),
        ("[1, 2]", "neither an existing"),
        ("half", "neither an existing .json/.yaml file, nor JSON text, nor k=v,k=v"),
        ("sparsity=0.5,sparsity=0.6", "given twice: sparsity"),
        ('{"sparsity": 0.5, "min_tokens": 0, "sparsity": 0.6}', "given twice: sparsity"),
        ("skip_layers=*", r"skip_layers: '\*' cannot be read"),
        ("sparsity={0.5", "sparsity: '{0.5' cannot be read"),
    ],
)
def test_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(text)


def test_a_folder_is_no_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"settings\.yaml is a folder"):
        parse_config(str(tmp_path / "settings.yaml"))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("a: [1,\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid"):
        parse_config(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not a text file in UTF-8"):
        parse_config(str(path))
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="must hold keys and values, not list"):
        parse_config(str(path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity: .*less than 1.*1\.0"),
        ({"sparsity": -0.1}, "sparsity: .*greater than or equal to 0"),
        ({"sparsity": "much"}, "sparsity: .*number"),
        ({"skip_first_steps": -1}, "skip_first_steps: -1 is negative"),
        ({"skip_first_steps": 0.2}, "skip_first_steps: 0.2 is neither a number of steps nor a share"),
        ({"skip_first_steps": "120%"}, "between 0% and 100%"),
        ({"skip_first_steps": True}, "skip_first_steps: True is neither"),
        ({"sparsity": False}, r"sparsity: Input should be a number, which true and false are not \(got False\)"),
        ({"min_tokens": True}, "min_tokens: Input should be a number"),
        ({"plan_refresh_steps": True}, "plan_refresh_steps: Input should be a number"),
        ({"skip_last_steps": "some"}, "skip_last_steps: 'some' is neither"),
        ({"skip_layers": "3-1"}, "'3-1' is neither a layer number nor a range"),
        ({"token_order": "hilbert"}, "token_order: .*'tile' or 'raster'"),
        ({"min_tokens": -4}, "min_tokens"),
    ],
)
def test_bad_values_say_what_is_wrong(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RainFusionAttentionConfig.from_mapping(values)


def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(UnknownKey, match="unknown key 'sparsty'; did you mean 'sparsity'"):
        RainFusionAttentionConfig.from_mapping({"sparsty": 0.5})
    with pytest.raises(UnknownKey, match="did you mean 'skip_first_steps'"):
        BlockSparseAttentionConfig.from_mapping({"skip_first_step": 3})
    with pytest.raises(UnknownKey, match="this backend has no configuration keys"):
        DenseAttentionConfig.from_mapping({"sparsity": 0.5})
    with pytest.raises(UnknownKey, match="threshold"):
        RainFusionAttentionConfig.from_mapping({"threshold": 0.9})


@pytest.mark.parametrize(
    ("value", "num_steps", "expected"),
    [(10, None, 10), ("20%", 20, 4), ("20%", 16, 4), ("33.3%", 30, 10), ("0%", 7, 0), ("20%", None, None)],
)
def test_steps(value: int | str, num_steps: int | None, expected: int | None) -> None:
    assert resolve_steps(value, num_steps) == expected


@pytest.mark.parametrize(("text", "expected"), [("", set()), ("0-1,38", {0, 1, 38}), (" 5 , 7-7", {5, 7}), ("3", {3})])
def test_layers(text: str, expected: set[int]) -> None:
    assert parse_layers(text) == expected


@pytest.mark.parametrize("text", ["10000", "0-99999999999"])
def test_more_layers_than_any_model_has_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"'{text}': no model has more than 10000 layers"):
        parse_layers(text)


def test_layers_may_be_a_list_or_a_number() -> None:
    assert RainFusionAttentionConfig.from_mapping({"skip_layers": [0, 3]}).skip_layers == "0,3"
    assert RainFusionAttentionConfig.from_mapping({"skip_layers": 5}).skip_layers == "5"


@pytest.mark.parametrize("name", ["twice.yaml", "twice.json"])
def test_a_file_names_each_key_once(name: str, tmp_path: Path) -> None:
    text = {"twice.yaml": "attention: {sparsity: 0.5, sparsity: 0.9}", "twice.json": '{"sparsity": 0.5, "sparsity": 0.9}'}[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{name}: given twice: sparsity"):
        parse_config(str(tmp_path / name))


class _Nested(KnownKeys):
    by_name: dict[str, str] = Field(default_factory=dict)
    number: int | None = None


def test_a_wrong_value_within_a_mapping_is_named_by_its_path() -> None:
    with pytest.raises(ConfigError, match=r"^by_name\.transformer: Input should be a valid string \(got 3\)$"):
        _Nested.from_mapping({"by_name": {"transformer": 3}})
    with pytest.raises(ConfigError, match=r"^number: Input should be a valid integer, .* \(got 'x'\)$"):
        _Nested.from_mapping({"number": "x"})
