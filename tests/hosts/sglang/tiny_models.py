"""sglang's own models, tiny and with random weights, and what its requests would say of their latents."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.multimodal_gen.runtime.distributed.parallel_state import get_sp_world_size
from sglang.multimodal_gen.runtime.layers.attention.selector import component_attn_backend_context_manager
from sglang.multimodal_gen.runtime.platforms import AttentionBackendEnum
from torch import Tensor

from hosts.sglang.server import HEAD_SIZE, LATENTS, forward_of, request, serve

# 32 x 48 tokens of 16 x 16 pixels
ROWS, COLUMNS, TEXT, WIDTH = 32, 48, 40, 32
IMAGE, REFERENCES = ROWS * COLUMNS, 300
PIXELS = {"height": 16 * ROWS, "width": 16 * COLUMNS}
PACKED = {"raw_latent_shape": (1, IMAGE, 16), **PIXELS}
STEP = torch.tensor([500.0])
AXES = (16, 24, 24)


@dataclass(frozen=True)
class TinyModel:
    """One of sglang's denoisers.

    Attributes:
        modules: of its configuration and of itself, below `configs.models.dits` and `runtime.models.dits`.
        names: classes of its architecture, its configuration, and itself.
        sizes: that make it tiny.
        run: calls it with its latents and a text `[1, TEXT, WIDTH]`.
        latents: shape of what it gets.
        request: what the request says of the latents.
        grid: as the report names it.
        references: tokens of `latents` that are those of references, behind the target's.
        others: calls of a forward that are dense since they see the text alone, another tower, or the like.
        dtype: of its weights.
        pipeline: of its configuration.
    """

    modules: tuple[str, str]
    names: tuple[str, str, str]
    sizes: dict[str, Any]
    run: Callable[[Any, Tensor, Tensor], Any]
    latents: tuple[int, ...]
    request: dict[str, Any]
    grid: str
    others: int = 0
    references: int = 0
    dtype: torch.dtype = torch.float32
    pipeline: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        """sglang's configuration of the model."""
        configs = importlib.import_module(f"sglang.multimodal_gen.configs.models.dits.{self.modules[0]}")
        return getattr(configs, self.names[1])(arch_config=getattr(configs, self.names[0])(**self.sizes))

    def build(self) -> Any:
        """Random weights, always the same; norms stay near one."""
        models = importlib.import_module(f"sglang.multimodal_gen.runtime.models.dits.{self.modules[1]}")
        made = getattr(models, self.names[2])(self.config(), hf_config={}).eval().to(self.dtype)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in sorted(made.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name and name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(1 + 0.1 * noise if is_norm else noise * (parameter.shape[-1] ** -0.5))
        return made


def rope(length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines that turn nothing."""
    return torch.ones(length, HEAD_SIZE // 2), torch.zeros(length, HEAD_SIZE // 2)


def _hunyuan_video(model: Any, latents: Tensor, text: Tensor) -> Any:
    return model(latents, [text, torch.ones(1, WIDTH)], STEP, guidance=torch.tensor([6016.0]))


def _flux(model: Any, latents: Tensor, text: Tensor) -> Any:
    return model(latents, text, torch.ones(1, WIDTH), STEP, STEP, freqs_cis=rope(TEXT + latents.shape[1]))


def _flux_2(model: Any, latents: Tensor, text: Tensor) -> Any:
    return model(latents, text, STEP, STEP, freqs_cis=rope(TEXT + latents.shape[1]))


def _qwen_image(model: Any, latents: Tensor, text: Tensor) -> Any:
    ropes = [rope(length) for length in (latents.shape[1], TEXT)]
    packed, turned = tuple(torch.cat(one, -1) for one in ropes), tuple(torch.complex(*one) for one in ropes)
    return model(latents, text, None, STEP, [[(1, ROWS, COLUMNS)]], [TEXT], freqs_cis=packed, freqs_complex=turned)


def _longcat_image(model: Any, latents: Tensor, text: Tensor) -> Any:
    return model(latents, text, STEP, torch.zeros(latents.shape[1], 3), torch.zeros(TEXT, 3))


def _krea_2(model: Any, latents: Tensor, text: Tensor) -> Any:
    return model(latents, text[:, :, None].expand(-1, -1, 2, -1), STEP / 1000, pos=torch.zeros(1, TEXT + latents.shape[1], 3))


def _z_image(model: Any, latents: Tensor, text: Tensor) -> Any:
    return model(latents, text, STEP, freqs_cis=(rope(64), rope(IMAGE)))


def _text_second(model: Any, latents: Tensor, text: Tensor) -> Any:
    return model(latents, text, STEP)


def _lingbot_video(model: Any, latents: Tensor, text: Tensor) -> Any:
    return model(latents, STEP, text)


def _joy_image(model: Any, latents: Tensor, text: Tensor) -> Any:
    return model(latents.bfloat16(), text.bfloat16(), STEP, txt_freqs_cis=torch.cat(rope(TEXT), -1))


def _ltx_2(model: Any, latents: Tensor, text: Tensor) -> Any:
    sizes = {"num_frames": 4, "height": 16, "width": 24, "audio_num_frames": 20}
    video, _ = model(latents, torch.ones(1, 20, 16), text, text, STEP, **sizes)
    return video


HEADS = {"num_attention_heads": 2, "attention_head_dim": HEAD_SIZE}
JOINT = {**HEADS, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": WIDTH, "axes_dims_rope": AXES}

MODELS = {
    "hunyuan_video": TinyModel(
        ("hunyuanvideo", "hunyuanvideo"),
        ("HunyuanVideoArchConfig", "HunyuanVideoConfig", "HunyuanVideoTransformer3DModel"),
        {
            **HEADS,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": WIDTH,
            "pooled_projection_dim": WIDTH,
            "rope_axes_dim": AXES,
        },
        _hunyuan_video,
        LATENTS,
        {"raw_latent_shape": LATENTS},
        "4x16x24",
        others=1,
    ),
    "flux": TinyModel(
        ("flux", "flux"),
        ("FluxArchConfig", "FluxConfig", "FluxTransformer2DModel"),
        {**JOINT, "in_channels": 16, "pooled_projection_dim": WIDTH},
        _flux,
        (1, IMAGE, 16),
        PACKED,
        "1x32x48",
    ),
    "flux_2": TinyModel(
        ("flux", "flux_2"),
        ("FluxArchConfig", "FluxConfig", "Flux2Transformer2DModel"),
        {
            **JOINT,
            "in_channels": 16,
            "extra_attrs": {"timestep_guidance_channels": 32, "mlp_ratio": 1.0, "rope_theta": 2000, "eps": 1e-6},
        },
        _flux_2,
        (1, IMAGE, 16),
        PACKED,
        "1x32x48",
    ),
    "flux_with_references": TinyModel(
        ("flux", "flux"),
        ("FluxArchConfig", "FluxConfig", "FluxTransformer2DModel"),
        {**JOINT, "in_channels": 16, "pooled_projection_dim": WIDTH},
        _flux,
        (1, IMAGE + REFERENCES, 16),
        PACKED,
        "1x32x48",
        references=REFERENCES,
    ),
    "qwen_image": TinyModel(
        ("qwenimage", "qwen_image"),
        ("QwenImageArchConfig", "QwenImageDitConfig", "QwenImageTransformer2DModel"),
        {**HEADS, "num_layers": 2, "in_channels": 16, "out_channels": 4, "joint_attention_dim": WIDTH, "axes_dims_rope": AXES},
        _qwen_image,
        (1, IMAGE, 16),
        PACKED,
        "1x32x48",
    ),
    "longcat_image": TinyModel(
        ("longcat_image", "longcat_image"),
        ("LongCatImageArchConfig", "LongCatImageDitConfig", "LongCatImageTransformer2DModel"),
        {**JOINT, "in_channels": 16, "pooled_projection_dim": WIDTH},
        _longcat_image,
        (1, IMAGE, 16),
        PACKED,
        "1x32x48",
    ),
    "krea_2": TinyModel(
        ("krea2", "krea2"),
        ("Krea2ArchConfig", "Krea2DitConfig", "Krea2Transformer2DModel"),
        {
            "features": 2 * HEAD_SIZE,
            "tdim": 32,
            "txtdim": WIDTH,
            "heads": 2,
            "kvheads": 1,
            "layers": 2,
            "channels": 4,
            "txtlayers": 2,
            "txtheads": 2,
            "txtkvheads": 2,
            "axes_dims": AXES,
            "in_channels": 16,
        },
        _krea_2,
        (1, IMAGE, 16),
        PACKED,
        "1x32x48",
        others=4,
    ),
    "z_image": TinyModel(
        ("zimage", "zimage"),
        ("ZImageArchConfig", "ZImageDitConfig", "ZImageTransformer2DModel"),
        {
            "dim": 2 * HEAD_SIZE,
            "num_layers": 1,
            "n_refiner_layers": 1,
            "num_attention_heads": 2,
            "n_kv_heads": 2,
            "in_channels": 4,
            "cap_feat_dim": WIDTH,
            "axes_dims": AXES,
        },
        _z_image,
        (1, 4, 1, 2 * ROWS, 2 * COLUMNS),
        {"raw_latent_shape": (1, 4, 1, 2 * ROWS, 2 * COLUMNS)},
        "1x32x48",
        others=1,
    ),
    "ernie_image": TinyModel(
        ("ernie_image", "ernie_image"),
        ("ErnieImageArchConfig", "ErnieImageDitConfig", "ErnieImageTransformer2DModel"),
        {
            **HEADS,
            "num_layers": 2,
            "in_channels": 16,
            "out_channels": 16,
            "ffn_hidden_size": 64,
            "text_in_dim": WIDTH,
            "rope_axes_dim": AXES,
        },
        _text_second,
        (1, 16, ROWS, COLUMNS),
        {"raw_latent_shape": (1, 16, ROWS, COLUMNS)},
        "1x32x48",
    ),
    "lingbot_video": TinyModel(
        ("lingbot_video_moe", "lingbot_video_moe"),
        ("LingBotVideoMoEArchConfig", "LingBotVideoMoEConfig", "LingBotVideoTransformer3DModel"),
        {
            "in_channels": 4,
            "out_channels": 4,
            "hidden_size": 2 * HEAD_SIZE,
            "num_attention_heads": 2,
            "depth": 2,
            "intermediate_size": 64,
            "text_dim": WIDTH,
            "freq_dim": 32,
            "axes_dims": AXES,
            "mlp_only_layers": (0, 1),
        },
        _lingbot_video,
        LATENTS,
        {"raw_latent_shape": LATENTS},
        "4x16x24",
    ),
    "joy_image": TinyModel(
        ("joy_image", "joy_image"),
        ("JoyImageArchConfig", "JoyImageDiTConfig", "JoyTransformer3DModel"),
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "mm_double_blocks_depth": 2,
            "freq_dim": 32,
            "text_states_dim": WIDTH,
            "mlp_width_ratio": 1.0,
            "rope_dim_list": list(AXES),
        },
        _joy_image,
        (1, 2 * IMAGE, 4, 1, 2, 2),
        {"raw_latent_shape": (1, IMAGE, 4, 1, 2, 2), "vae_image_sizes": [(1, ROWS, COLUMNS), (1, COLUMNS, ROWS)]},
        "1x32x48 + 1x48x32",
        dtype=torch.bfloat16,
    ),
    "anima": TinyModel(
        ("anima", "anima"),
        ("AnimaArchConfig", "AnimaDiTConfig", "AnimaTransformer3DModel"),
        {**HEADS, "num_layers": 2, "in_channels": 4, "out_channels": 4, "mlp_ratio": 1.0, "text_embed_dim": WIDTH, "adaln_lora_dim": 16},
        _text_second,
        (1, 4, 1, 2 * ROWS, 2 * COLUMNS),
        {"raw_latent_shape": (1, 4, 1, 2 * ROWS, 2 * COLUMNS)},
        "1x32x48",
    ),
    "ltx_2": TinyModel(
        ("ltx_2", "ltx_2"),
        ("LTX2ArchConfig", "LTX2Config", "LTX2VideoTransformer3DModel"),
        {
            **HEADS,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 2,
            "cross_attention_dim": 2 * HEAD_SIZE,
            "caption_channels": WIDTH,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 32,
            "audio_in_channels": 16,
            "audio_out_channels": 16,
            "audio_cross_attention_dim": 64,
        },
        _ltx_2,
        (1, 4 * 16 * 24, 16),
        {"raw_latent_shape": (1, 4 * 16 * 24, 16), "height": 16 * 32, "width": 24 * 32},
        "4x16x24",
        others=2,
        pipeline={"vae_scale_factor": 32, "patch_size": 1},
    ),
}

# models whose ranks share the latents: frames, or tokens
SHARED_AXIS = {"hunyuan_video": 2, "flux": 1, "flux_with_references": 1, "qwen_image": 1, "longcat_image": 1}


def latents_and_texts(model: TinyModel) -> tuple[Tensor, list[Tensor]]:
    """Latents, and two texts."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(model.latents, generator=generator), list(torch.randn(2, 1, TEXT, WIDTH, generator=generator))


def parts(name: str, whole: Tensor, ranks: int) -> list[Tensor]:
    """What ranks have of the latents, or of what a model makes of them: references are shared apart from the target."""
    axis, references = SHARED_AXIS[name], MODELS[name].references
    streams = whole.split([whole.shape[axis] - references, references], dim=axis)
    return [torch.cat(of_rank, dim=axis) for of_rank in zip(*(stream.chunk(ranks, dim=axis) for stream in streams), strict=True)]


def prepared(model: TinyModel, name: str, config: dict[str, Any]) -> tuple[Any, Any, Any]:
    """sglang's arguments of the server, its request, and the model.

    The backend is asked for as by the command line: some models do not have it in their lists.
    """
    server_args, batch = serve(name, **config), request()
    vars(server_args.pipeline_config).update(model.pipeline, dit_config=model.config())
    vars(batch).update({"image_latent": None, "vae_image_sizes": None, **model.request})
    if model.references:
        batch.image_latent = torch.empty(1, model.references // get_sp_world_size(), 16)
    with component_attn_backend_context_manager(AttentionBackendEnum[name.upper()], component_name="transformer"):
        return server_args, batch, model.build()


def one_forward(model: TinyModel, name: str, config: dict[str, Any], latents: Tensor, text: Tensor) -> Tensor:
    """Of step 1, sparse at once where a sparsity is asked for."""
    server_args, batch, made = prepared(model, name, {"skip_first_steps": 0, "min_tokens": 0, **config} if config else {})
    with forward_of(1, batch, server_args):
        out: Tensor = model.run(made, latents.to(model.dtype), text)
    return out.float()
