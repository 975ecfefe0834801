"""Tiny saved pipelines, and a way to run the command inside the test's process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="the command line drives diffusers")

from ditattn.cli.app import run
from ditattn.hosts.diffusers.demo_model import RANDOM_MODEL, build_random_model

# 5 frames of 64 x 64 pixels: 1280 tokens, 10 blocks
SMALL = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 4}


@dataclass
class Finished:
    """What a run of the command left behind."""

    status: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("ditattn: ")]


@pytest.fixture
def ditattn(capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Run the command with these arguments."""

    def command(*arguments: Any) -> Finished:
        capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Finished(status, captured.out, captured.err)

    return command


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan pipeline like the demo model, with one layer of two small heads and a narrow VAE, which takes longest otherwise."""
    folder = tmp_path_factory.mktemp("wan")
    transformer = {**RANDOM_MODEL["transformer"], "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 64}
    build_random_model(folder, {**RANDOM_MODEL, "transformer": transformer, "vae": {**RANDOM_MODEL["vae"], "base_dim": 8}})
    return folder


@pytest.fixture(scope="session")
def wan_temporal_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan pipeline whose VAE compresses time by 4 and space by 8, as the real ones do."""
    folder = tmp_path_factory.mktemp("wan_temporal")
    build_random_model(folder, wan_temporal_recipe())
    return folder


def wan_temporal_recipe() -> dict[str, Any]:
    vae = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 64, "in_channels": 16, "out_channels": 16}
    return {**RANDOM_MODEL, "vae": vae, "transformer": {**RANDOM_MODEL["transformer"], **sizes}}


@pytest.fixture(scope="session")
def wan22_folder(wan_temporal_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wan 2.2's arrangement of two transformers."""
    import torch
    from diffusers import WanPipeline, WanTransformer3DModel

    torch.manual_seed(1)
    second = WanTransformer3DModel(**wan_temporal_recipe()["transformer"])
    parts = WanPipeline.from_pretrained(wan_temporal_folder).components
    folder = tmp_path_factory.mktemp("wan22")
    WanPipeline(**{**parts, "transformer_2": second}, boundary_ratio=0.9).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wan_i2v_folder(wan_temporal_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wan 2.2's image-to-video: the first frame comes in through the latents, there is no image encoder."""
    from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel

    parts = {
        name: part
        for name, part in WanPipeline.from_pretrained(wan_temporal_folder).components.items()
        if not name.startswith("transformer")
    }
    transformer = WanTransformer3DModel(**{**wan_temporal_recipe()["transformer"], "in_channels": 36})
    folder = tmp_path_factory.mktemp("wan_i2v")
    WanImageToVideoPipeline(**parts, transformer=transformer, image_encoder=None, image_processor=None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Flux pipeline: an image model."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from ditattn.hosts.diffusers.demo_model import _tokenizer

    torch.manual_seed(0)
    tokenizer = _tokenizer(RANDOM_MODEL["words"].split())
    tokenizer.model_max_length = 16
    clip = CLIPTextConfig(
        vocab_size=64, hidden_size=20, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=40,
            pooled_projection_dim=20,
            axes_dims_rope=(8, 12, 12),
            guidance_embeds=True,
        ),
        vae=AutoencoderKL(
            latent_channels=4,
            block_out_channels=(8,),
            norm_num_groups=2,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.0,
            shift_factor=0.0,
        ),
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=64, d_model=40, d_kv=10, d_ff=40, num_layers=1, num_heads=2)),
        tokenizer_2=tokenizer,
    )
    folder = tmp_path_factory.mktemp("flux")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def small(wan_folder: Path, tmp_path: Path) -> list[Any]:
    """Arguments of a quick run that writes to `tmp_path / "out"`."""
    options = [part for key, value in SMALL.items() for part in ("--" + key.replace("_", "-"), value)]
    return ["generate", "--model-path", wan_folder, "--prompt", "a red circle", "--output-path", tmp_path / "out", *options]
