"""`--quantization` as a user types it: generate, compare, backends, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ditattn.cli.availability import quantization_availability
from ditattn.compare.setting import expand, setting_names
from ditattn.devices import DEVICES
from ditattn.quantization.request import METHODS, Quantization

CALL = ("--prompt", "a red circle", "--height", 64, "--width", 64, "--num-frames", 1, "--num-inference-steps", 2, "--guidance-scale", 1)
# of the one block of `wan_folder`: two attentions of four projections, two layers of the feed-forward
LAYERS = 10


@pytest.fixture
def call(wan_folder: Path, tmp_path: Path) -> list[Any]:
    return ["--model-path", wan_folder, *CALL, "--output-path", tmp_path, "--output-file-name", "clip"]


def test_generate_reports_layers_and_memory(ditattn, call, tmp_path):
    done = ditattn(
        "generate", *call, "--quantization", "mxfp4", "--quantization-skip", "*.attn2.*", "--perf-dump-path", tmp_path / "p.json"
    )
    assert done.status == 0, done.err
    sidecar = json.loads((tmp_path / "clip.json").read_text())
    component = sidecar["quantization"]["components"]["transformer"]
    assert (component["layers"], component["ran"], len(component["skipped"])) == (LAYERS - 4, LAYERS - 4, 4)
    assert component["originals"] == "dropped"
    assert 0 < component["bytes_saved"] == component["bytes_before"] - component["bytes_after"]
    assert json.loads((tmp_path / "p.json").read_text())["quantization"] == sidecar["quantization"]
    assert f"quantisation (transformer): {LAYERS - 4} linear layers ({LAYERS - 4} in mxfp4), all ran" in done.out
    assert sidecar["settings"]["given"]["quantization"] == "mxfp4"


def test_nothing_is_said_of_it_where_nobody_asks(ditattn, call, tmp_path):
    done = ditattn("generate", *call)
    assert done.status == 0, done.err
    assert "quantization" not in json.loads((tmp_path / "clip.json").read_text())
    assert "quantisation" not in done.out


def test_a_checkpoint_in_place_of_a_method(ditattn, call, wan_folder, tmp_path):
    from diffusers import WanTransformer3DModel

    from msmodelslim_writer import DUAL, PLAIN, write

    model = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    write(tmp_path / "quant", model, {"blocks.0.attn1.to_q": PLAIN, "blocks.0.ffn.net.2": DUAL})
    done = ditattn("generate", *call, "--quantization", tmp_path / "quant")
    assert done.status == 0, done.err
    component = json.loads((tmp_path / "clip.json").read_text())["quantization"]["components"]["transformer"]
    assert component["kinds"] == {PLAIN: 1, DUAL: 1}


def test_compare_sweeps_it(ditattn, wan_folder, tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = [
        *("compare", "--model-path", wan_folder, *CALL, "--num-frames", 4, "--output-path", tmp_path, "--output-file-name", "page"),
        *("--attention-backend", "torch_sdpa", "--attention-backend", "rain_fusion_attn", "--grid", "sparsity=0.7"),
        *("--attention-backend-config", "skip_first_steps=0,min_tokens=0", "--no-probe"),
        *("--quantization", "none", "--quantization", "mxfp4"),
    ]
    done = ditattn(*arguments)
    assert done.status == 0, done.err
    settings = {setting["name"]: setting for setting in json.loads((tmp_path / "page.json").read_text())["settings"]}
    assert [setting["quantization"] for setting in settings.values()] == ["mxfp4", None, "mxfp4"], "the reference itself is no setting"
    assert [setting["backend"] for setting in settings.values()] == ["torch_sdpa", "rain_fusion_attn", "rain_fusion_attn"]
    for setting in settings.values():
        (clip,) = setting["clips"]
        assert clip["psnr"] != "inf"
        if setting["quantization"]:
            assert clip["quantization"]["components"]["transformer"]["ran"] == LAYERS
        else:
            assert clip["quantization"] is None


def test_settings_are_every_combination_but_the_reference() -> None:
    mxfp4 = Quantization.parse("mxfp4")
    skipping = Quantization.parse("mxfp4", skip="blocks.0.*")
    settings = expand(["torch_sdpa", "rain_fusion_attn"], [], {}, None, [None, mxfp4, skipping])
    assert setting_names(settings) == [
        "torch_sdpa + mxfp4",
        "torch_sdpa + mxfp4 but blocks.0.*",
        "rain_fusion_attn",
        "rain_fusion_attn + mxfp4",
        "rain_fusion_attn + mxfp4 but blocks.0.*",
    ]
    assert [setting.with_keys().quantization for setting in settings[2:4]] == [None, mxfp4]


def test_a_folder_that_diffusers_quantised(ditattn, call, wan_folder, tmp_path):
    """It runs sparse as it is, and --quantization says that there is nothing left to do."""
    pytest.importorskip("torchao")
    from diffusers import PipelineQuantizationConfig, TorchAoConfig, WanPipeline
    from torchao.quantization import Int8WeightOnlyConfig

    config = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig())})
    WanPipeline.from_pretrained(wan_folder, quantization_config=config).save_pretrained(tmp_path / "int8")
    call = [*call, "--model-path", tmp_path / "int8", "--num-frames", 4]
    sparse = ["--attention-backend", "rain_fusion_attn", "--attention-backend-config", "skip_first_steps=0,min_tokens=0,sparsity=0.5"]
    done = ditattn("generate", *call, *sparse, "--strict")
    assert done.status == 0, done.err
    component = json.loads((tmp_path / "clip.json").read_text())["attention"]["components"]["transformer"]
    assert (component["sparse"], component["dense"]) == (2, 0)
    done = ditattn("generate", *call, "--quantization", "mxfp4")
    assert done.status == 2
    assert len(done.error_lines) == 1
    assert "blocks.0.attn1.to_q: quantised already: its weight is of class Int8Tensor" in done.error_lines[0]


WRONG = {
    "unknown": (["generate", "--quantization", "mxfp8"], "no quantisation 'mxfp8'; did you mean 'mxfp4'"),
    "no folder": (["generate", "--quantization", "./nowhere"], "no folder ./nowhere"),
    "empty folder": (["generate", "--quantization", "."], "quant_model_description*.json"),
    "pattern of nothing": (
        ["generate", "--quantization", "mxfp4", "--quantization-skip", "blocks.9.*"],
        "no linear layer is called blocks.9.*",
    ),
    "skip alone": (["generate", "--quantization-skip", "blocks.0.*"], "--quantization-skip needs --quantization"),
    "skip alone, compare": (
        ["compare", "--attention-backend", "rain_fusion_attn", "--quantization-skip", "x"],
        "--quantization-skip needs --quantization",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_in_one_line(case, ditattn, call, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    (verb, *options), text = WRONG[case]
    done = ditattn(verb, *call, *options)
    assert done.status == 2
    assert len(done.error_lines) == 1
    assert text in done.err


def test_backends_lists_every_format_on_every_device(ditattn):
    rows = json.loads(ditattn("backends", "--json").out)["quantization"]
    assert rows == [vars(row) for row in quantization_availability()]
    assert {(row["device"], row["quantization"]) for row in rows} == {(device, method) for device in DEVICES for method in METHODS}
    for row in rows:
        assert row["available"] == (row["reason"] is None)
    serving = {(row["device"], row["quantization"]): row["implementation"] for row in rows if row["serves"]}
    assert serving["cpu", "mxfp4"] == serving["cpu", "mxfp4_dualscale"] == "torch"
    dual = next(row for row in rows if (row["device"], row["quantization"], row["implementation"]) == ("npu", "mxfp4", "ascend_dual_level"))
    assert dual["reason"]


def test_the_table_shows_them(ditattn):
    text = ditattn("backends", "--device", "cpu").out
    assert "quantisation: mxfp4, mxfp4_dualscale" in text
    assert "mx_linear" in text
