"""Denoisers that diffusers' loader quantised, by each quantiser that needs no GPU: served as they are, and left alone by `quantize`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ditattn
import tiny_pipelines
from ditattn.errors import UnsupportedModel
from tiny_pipelines import TinyPipeline
from tiny_pipelines.wan import transformer

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE: dict[str, Any] = {"sparsity": 0.6, "skip_first_steps": 0, "min_tokens": 0}


def load(folder: Path, config: Any) -> nn.Module:
    from diffusers import WanTransformer3DModel

    model: nn.Module = WanTransformer3DModel.from_pretrained(folder, quantization_config=config)
    return model


def by_torchao(folder: Path, *not_converted: str) -> nn.Module:
    pytest.importorskip("torchao")
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return load(folder, TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(not_converted) or None))


def by_torchao_with_activations(folder: Path, *not_converted: str) -> nn.Module:
    pytest.importorskip("torchao")
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return load(folder, TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=list(not_converted) or None))


def by_quanto(folder: Path, *not_converted: str) -> nn.Module:
    pytest.importorskip("optimum.quanto")
    from diffusers import QuantoConfig

    # it knows modules by the last part of their path
    last = ["proj", "2"] if not_converted == ("ffn",) else list(not_converted)
    return load(folder, QuantoConfig(weights_dtype="int8", modules_to_not_convert=last or None))


def by_gguf(folder: Path, *not_converted: str) -> nn.Module:
    """The model as a GGUF file, its blocks in eight bits but for what is not to be converted."""
    gguf = pytest.importorskip("gguf")
    from diffusers import GGUFQuantizationConfig, WanTransformer3DModel

    kind, file = gguf.GGMLQuantizationType.Q8_0, folder / "model.gguf"
    writer = gguf.GGUFWriter(str(file), "wan")
    for name, tensor in WanTransformer3DModel.from_pretrained(folder).state_dict().items():
        is_quantised = ".weight" in name and any(part in name for part in ("attn", "ffn")) and "norm" not in name
        if is_quantised and not any(part in name for part in not_converted):
            writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = GGUFQuantizationConfig(compute_dtype=torch.float32)
    model: nn.Module = WanTransformer3DModel.from_single_file(str(file), config=str(folder), quantization_config=config)
    return model


Loader = Callable[..., nn.Module]
LOADERS: dict[str, Loader] = {
    "torchao": by_torchao,
    "torchao with activations": by_torchao_with_activations,
    "quanto": by_quanto,
    "gguf": by_gguf,
}
every_quantiser = pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)


@pytest.fixture
def tiny(tmp_path: Path) -> TinyPipeline:
    """A Wan pipeline, whose denoiser is saved in `tmp_path`."""
    # GGUF's blocks are of 32 numbers
    tiny = tiny_pipelines.wan(transformer=transformer(ffn_dim=64))
    tiny.pipe.transformer.save_pretrained(tmp_path)
    return tiny


def linear_layers(model: nn.Module) -> set[str]:
    """Attention projections and feed-forward of the blocks, by the names of Wan's modules."""
    ends = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    return {path for path, _ in model.named_modules() if path.startswith("blocks.") and path.endswith(ends)}


@every_quantiser
def test_attention_is_served(loader: Loader, tiny: TinyPipeline, tmp_path: Path) -> None:
    exact = tiny.run(2)
    tiny.pipe.transformer = loader(tmp_path)
    native = tiny.run(2)
    assert not torch.equal(native.float(), exact)
    with ditattn.install(tiny.pipe, "torch_sdpa", strict=True):
        torch.testing.assert_close(tiny.run(2), native)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **SPARSE) as handle:
        sparse = tiny.run(2)
    report = handle.report().components["transformer"]
    assert report.dense == 0
    assert report.sparse > 0
    assert sparse.isfinite().all()
    assert not torch.equal(sparse, native)
    assert torch.equal(tiny.run(2), native)


@every_quantiser
def test_all_layers_quantised_is_said_and_changes_nothing(loader: Loader, tiny: TinyPipeline, tmp_path: Path) -> None:
    tiny.pipe.transformer = model = loader(tmp_path)
    native = tiny.run(1)
    before = {path: (type(part), getattr(part, "weight", None)) for path, part in model.named_modules()}
    with pytest.raises(UnsupportedModel, match=r"no linear layer can be quantised \(blocks.0.attn1.to_q: quantised already"):
        ditattn.quantize(tiny.pipe, "mxfp4")
    after = {path: (type(part), getattr(part, "weight", None)) for path, part in model.named_modules()}
    assert all(type_ is after[path][0] and weight is after[path][1] for path, (type_, weight) in before.items())
    assert before.keys() == after.keys()
    assert torch.equal(tiny.run(1), native)


@every_quantiser
def test_what_the_loader_left_is_quantised_and_its_own_layers_are_named(loader: Loader, tiny: TinyPipeline, tmp_path: Path) -> None:
    tiny.pipe.transformer = model = loader(tmp_path, "ffn")
    native = tiny.run(1)
    theirs = {path: model.get_submodule(path) for path in linear_layers(model) if "attn" in path}
    assert len(theirs) == 16
    with ditattn.quantize(tiny.pipe, "mxfp4") as handle:
        assert not torch.equal(tiny.run(1), native)
        report = handle.report().components["transformer"]
        assert set(report.left_alone) == set(theirs)
        assert all("quantised already" in reason for reason in report.left_alone.values())
        assert (report.layers, report.ran) == (4, 4)
        assert all(model.get_submodule(path) is layer for path, layer in theirs.items())
    assert torch.equal(tiny.run(1), native)
