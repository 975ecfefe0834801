"""Checkpoints of msmodelslim: read exactly, by any of their names, and refused in a sentence where they do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ditattn
import msmodelslim_writer
import tiny_pipelines
from ditattn.errors import ConfigError
from ditattn.ops.mx_linear.reference import decoded_weight, rounded, rounded_dual
from ditattn.quantization.mx_layer import MXLinear
from msmodelslim_writer import DUAL, FLOAT, PLAIN, write
from tiny_pipelines.wan import transformer

pytestmark = pytest.mark.usefixtures("one_thread")

QUERY, OUT, UP, DOWN = "blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.0.ffn.net.0.proj", "blocks.1.ffn.net.2"
KINDS = {QUERY: PLAIN, OUT: DUAL, UP: DUAL, DOWN: PLAIN}


def smoothing(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {path: 0.5 + torch.rand(model.get_submodule(path).in_features, generator=generator) for path in (UP, DOWN)}


def ours(model: nn.Module) -> dict[str, MXLinear]:
    return {path: part for path, part in model.named_modules() if isinstance(part, MXLinear)}


@pytest.mark.parametrize("packed", [False, True], ids=["a byte a value", "two values a byte"])
@pytest.mark.parametrize("wan_names", [False, True], ids=["diffusers' names", "Wan's own names"])
def test_every_kind_is_read_exactly(tmp_path: Path, packed: bool, wan_names: bool) -> None:
    model = transformer()
    scales = smoothing(model)
    write(tmp_path, model, KINDS, packed=packed, mul_scales=scales, wan_names=wan_names)
    plain = {path: model.get_submodule(path) for path in KINDS}
    with ditattn.quantize(model, checkpoint=tmp_path) as handle:
        found = ours(model)
        assert set(found) == set(KINDS)
        for path, layer in found.items():
            weight = plain[path].weight / scales[path] if path in scales else plain[path].weight
            expected = rounded_dual(weight) if KINDS[path] == DUAL else rounded(weight)
            assert torch.equal(decoded_weight(layer.mx_weight), expected)
            assert (layer.mul_scale is None) == (path not in scales)
            x = torch.randn(5, layer.in_features)
            with torch.no_grad():
                out, native = layer(x), plain[path](x)
            assert (out - native).norm() < 0.3 * native.norm()
        assert handle.report().components["WanTransformer3DModel"].kinds == {PLAIN: 2, DUAL: 2}
    assert all(model.get_submodule(path) is layer for path, layer in plain.items())


def test_without_mul_scale_the_result_is_another_one(tmp_path: Path) -> None:
    """It is multiplied into the activation, not merely read."""
    model = transformer()
    scales = {DOWN: torch.full((model.get_submodule(DOWN).in_features,), 4.0)}
    write(tmp_path, model, {DOWN: PLAIN}, mul_scales=scales)
    x = torch.randn(5, 40)
    with torch.no_grad():
        native = model.get_submodule(DOWN)(x)
        with ditattn.quantize(model, checkpoint=tmp_path):
            layer = ours(model)[DOWN]
            assert (layer(x) - native).norm() < 0.3 * native.norm()
            layer.mul_scale_bits = None
            assert (layer(x) - native).norm() > 0.5 * native.norm()


def test_a_mul_scale_of_ones_costs_nothing(tmp_path: Path) -> None:
    model = transformer()
    write(tmp_path, model, {QUERY: PLAIN}, mul_scales={QUERY: torch.ones(64)})
    with ditattn.quantize(model, checkpoint=tmp_path):
        assert ours(model)[QUERY].mul_scale is None


def test_the_bias_is_the_checkpoints(tmp_path: Path) -> None:
    model = transformer()
    with torch.no_grad():
        other = transformer()
        other.get_submodule(UP).bias.fill_(2.0)
    write(tmp_path, other, {UP: PLAIN})
    own = model.get_submodule(UP).bias
    with ditattn.quantize(model, checkpoint=tmp_path):
        assert torch.equal(ours(model)[UP].bias.detach(), torch.full((40,), 2.0))
    assert model.get_submodule(UP).bias is own


def test_layers_outside_the_familys_rule_and_patterns(tmp_path: Path) -> None:
    model = transformer()
    write(tmp_path, model, {"proj_out": PLAIN, QUERY: PLAIN, OUT: PLAIN})
    with ditattn.quantize(model, checkpoint=tmp_path, skip="*.attn2.*") as handle:
        assert set(ours(model)) == {"proj_out", QUERY}
        assert handle.report().components["WanTransformer3DModel"].skipped == [OUT]


@pytest.mark.parametrize("folders", [("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")])
def test_two_denoisers_have_folders_of_their_own(tmp_path: Path, folders: tuple[str, str]) -> None:
    tiny = tiny_pipelines.wan_two_transformers()
    for folder, kinds, model in zip(folders, ({QUERY: PLAIN}, {OUT: DUAL}), (tiny.pipe.transformer, tiny.pipe.transformer_2), strict=True):
        write(tmp_path / folder, model, kinds)
    with ditattn.quantize(tiny.pipe, checkpoint=tmp_path) as handle:
        assert (set(ours(tiny.pipe.transformer)), set(ours(tiny.pipe.transformer_2))) == ({QUERY}, {OUT})
        tiny.run(2)
        assert [one.ran for one in handle.report().components.values()] == [1, 1]


def test_a_denoiser_without_a_folder_is_named(tmp_path: Path) -> None:
    tiny = tiny_pipelines.wan_two_transformers()
    write(tmp_path / "transformer", tiny.pipe.transformer, {QUERY: PLAIN})
    with ditattn.quantize(tiny.pipe, checkpoint=tmp_path) as handle:
        assert "has no folder transformer_2" in handle.report().not_served["transformer_2"]


def described(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "quant_model_description.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "quant_model_weights.safetensors"
        content = load_file(path)
        change(content)
        save_file(content, path)

    return damage


def only_pickles(folder: Path) -> None:
    (folder / "quant_model_weights.safetensors").rename(folder / "quant_model_weights.bin")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "unknown kind": (described(lambda d: d.update({f"{OUT}.weight": "W8A8_DYNAMIC"})), rf"layer {OUT} is of kind W8A8_DYNAMIC"),
    "MXFP8": (described(lambda d: d.update({f"{OUT}.weight": "W8A8_MXFP8"})), f"layer {OUT} is of kind W8A8_MXFP8"),
    "another model": (described(lambda d: d.update({"blocks.7.attn1.to_q.weight": PLAIN})), "no linear layer blocks.7.attn1.to_q"),
    "nothing quantised": (described(lambda d: d.update(dict.fromkeys(d, FLOAT))), "every layer is FLOAT"),
    "no description": (lambda folder: (folder / "quant_model_description.json").unlink(), r"no quant_model_description\*.json"),
    "no JSON": (lambda folder: (folder / "quant_model_description.json").write_text("{"), "is no JSON"),
    "pickles": (only_pickles, "quant_model_weights.bin, which is not read because it can hold code"),
    "no scale": (tensors(lambda t: t.pop(f"{QUERY}.weight_scale")), f"{QUERY} is described as {PLAIN}, and its weight_scale is in no file"),
    "no dual scale": (tensors(lambda t: t.pop(f"{UP}.weight_dual_scale")), f"{UP} is described as {DUAL}, and its weight_dual_scale"),
    "another shape": (tensors(lambda t: t.update({f"{QUERY}.weight": torch.zeros(3, 32, dtype=torch.uint8)})), f"{QUERY}.weight should be"),
    "another type": (tensors(lambda t: t.update({f"{QUERY}.weight": torch.zeros(64, 64)})), "not torch.float32"),
    "values that FP4 has not": (
        tensors(lambda t: t.update({f"{QUERY}.weight": torch.full((64, 64), 5.0).to(torch.float8_e4m3fn)})),
        f"{QUERY}.weight holds values that are not of FP4",
    ),
    "short mul_scale": (tensors(lambda t: t.update({f"{UP}.mul_scale": torch.ones(3)})), rf"{UP}.mul_scale should be \[64\]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused_and_leaves_no_trace(tmp_path: Path, damage: str) -> None:
    model = transformer()
    objects = {path: id(part) for path, part in model.named_modules()}
    write(tmp_path, model, KINDS)
    change, text = DAMAGES[damage]
    change(tmp_path)
    with pytest.raises(ConfigError, match=text):
        ditattn.quantize(model, checkpoint=tmp_path)
    assert {path: id(part) for path, part in model.named_modules()} == objects
    assert "save_pretrained" not in vars(model)


def test_the_writer_is_no_copy_of_the_reader() -> None:
    """What it packs is unpacked by hand here."""
    weight = torch.tensor([[0.5, -1.0, 6.0, 3.0] * 8])
    packed = msmodelslim_writer.stored(weight, PLAIN, packed=True)
    assert packed["weight"][0, :2].tolist() == [1 + 16 * 10, 7 + 16 * 5]
    assert packed["weight_scale"].tolist() == [[127]]
    plain = msmodelslim_writer.stored(weight, PLAIN, packed=False)
    assert torch.equal(plain["weight"].float(), weight)
