"""Denoisers of video in a loop of their own: 5 x 14 x 20 tokens, 11 blocks, and what stands behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiny_pipelines.loop import looped, with_louder_values, without_zeros
from tiny_pipelines.pipeline import ATTENTION, HEADS, LAYERS, SIZES, WIDTH, TinyPipeline, denoiser, first, noise, prompts

# of the latents
SHAPE = (1, 4, 5, 28, 40)


def cosmos() -> TinyPipeline:
    """Cosmos: both CFG branches one after the other."""
    from diffusers import CosmosTransformer3DModel

    transformer = denoiser(
        CosmosTransformer3DModel,
        **SIZES,
        num_layers=LAYERS,
        mlp_ratio=2,
        text_embed_dim=24,
        adaln_lora_dim=4,
        max_size=(8, 64, 64),
        # what it does with padding needs torchvision
        concat_padding_mask=False,
    )
    return looped(transformer, SHAPE, {**prompts(1, 12, 24), "fps": 16})


KANDINSKY: dict[str, Any] = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 24,
    "in_text_dim2": 12,
    "time_dim": 16,
    "model_dim": WIDTH,
    "ff_dim": 40,
    "num_text_blocks": 1,
    "num_visual_blocks": LAYERS,
    "axes_dims": (8, 12, 12),
}


def kandinsky5() -> TinyPipeline:
    """Kandinsky 5: latents with the channels last, and a block for the text."""
    from diffusers import Kandinsky5Transformer3DModel

    transformer = denoiser(Kandinsky5Transformer3DModel, **KANDINSKY)
    inputs = {
        **prompts(1, 12, 24),
        "pooled_projections": noise(1, 12),
        "visual_rope_pos": [torch.arange(size) for size in (5, 14, 20)],
        "text_rope_pos": torch.arange(12),
    }
    return looped(without_zeros(transformer), (1, 5, 28, 40, 4), inputs, predict=_without_tuple)


def ltx2(keyframe: bool = False) -> TinyPipeline:
    """LTX 2: video and audio, which stays noise here; text in cross-attention; perhaps a keyframe behind the video."""
    from diffusers import LTX2VideoTransformer3DModel

    transformer = denoiser(
        LTX2VideoTransformer3DModel,
        in_channels=6,
        out_channels=6,
        **ATTENTION,
        cross_attention_dim=WIDTH,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=HEADS,
        audio_attention_head_dim=16,
        audio_cross_attention_dim=HEADS * 16,
        num_layers=LAYERS,
        caption_channels=24,
        rope_double_precision=False,
    )
    inputs = {
        "prompt_embeds": noise(1, 12, 24),
        "audio_encoder_hidden_states": noise(1, 12, 24, seed=3),
        "audio_hidden_states": noise(1, 26, 4, seed=4),
        "num_frames": 5,
        "height": 14,
        "width": 20,
        "audio_num_frames": 26,
    }
    if not keyframe:
        return looped(transformer, (1, 5 * 14 * 20, 6), inputs)
    starts = torch.cat([_places(0.0, 1.0, 2.0, 3.0, 4.0), _places(3.0)]).T
    inputs |= {"reference": noise(1, 14 * 20, 6, seed=5), "video_coords": torch.stack([starts, starts + 1], -1)[None]}
    return looped(transformer, (1, 5 * 14 * 20, 6), inputs, predict=_before_keyframe)


def _places(*times: float) -> Tensor:
    """Time, row and column of frames of 14 x 20 tokens, `(S, 3)`."""
    return torch.cartesian_prod(torch.tensor(times), torch.arange(14.0), torch.arange(20.0))


def _before_keyframe(transformer: Any, latents: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
    tokens = torch.cat([latents, inputs.pop("reference")], 1)
    rows: Tensor = transformer(hidden_states=tokens, timestep=timestep, **inputs, return_dict=False)[0]
    return rows[:, : latents.shape[1]]


def mochi() -> TinyPipeline:
    """Mochi: both CFG branches in one batch, 9 and 4 real ones of 12 text tokens behind the video."""
    from diffusers import MochiTransformer3DModel

    transformer = denoiser(
        MochiTransformer3DModel,
        patch_size=2,
        **ATTENTION,
        num_layers=LAYERS,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=8,
        max_sequence_length=12,
    )
    mask = torch.arange(12)[None] < torch.tensor([[9], [4]])
    return looped(transformer, (2, 4, 5, 28, 40), {"prompt_embeds": noise(2, 12, 24), "encoder_attention_mask": mask})


def motif_video() -> TinyPipeline:
    """Motif Video: 6 image and 12 text tokens behind the video, 9 of them real; in the decoder's layer the video once more."""
    from diffusers import MotifVideoTransformer3DModel

    transformer = denoiser(
        MotifVideoTransformer3DModel,
        **SIZES,
        num_layers=1,
        num_single_layers=LAYERS - 1,
        num_decoder_layers=1,
        mlp_ratio=2,
        text_embed_dim=24,
        image_embed_dim=16,
        rope_axes_dim=(8, 12, 12),
    )
    inputs = {**prompts(1, 12, 24), "encoder_attention_mask": first(9, of=12), "image_embeds": noise(1, 6, 16)}
    return looped(with_louder_values(transformer), SHAPE, inputs)


def helios() -> TinyPipeline:
    """Helios: 140 + 35 + 15 tokens of earlier frames before the video, 12 blocks."""
    from diffusers import HeliosTransformer3DModel

    transformer = denoiser(
        HeliosTransformer3DModel,
        **SIZES,
        text_dim=24,
        freq_dim=16,
        ffn_dim=40,
        num_layers=LAYERS,
        rope_dim=(8, 12, 12),
        is_amplify_history=True,
    )
    frames, inputs = 0, prompts(1, 12, 24)
    for name, count in (("long", 4), ("mid", 1), ("short", 1)):
        inputs[f"latents_history_{name}"] = noise(1, 4, count, 28, 40, seed=count)
        inputs[f"indices_latents_history_{name}"] = torch.arange(frames, frames + count)[None]
        frames += count
    inputs["indices_hidden_states"] = torch.arange(frames, frames + 5)[None]
    return looped(with_louder_values(transformer), SHAPE, inputs)


def allegro() -> TinyPipeline:
    """Allegro: its processors call torch's SDPA themselves."""
    from diffusers import AllegroTransformer3DModel

    transformer = denoiser(
        AllegroTransformer3DModel,
        **SIZES,
        num_layers=LAYERS,
        cross_attention_dim=WIDTH,
        sample_width=40,
        sample_height=28,
        sample_frames=5,
        caption_channels=24,
    )
    return looped(transformer, SHAPE, {**prompts(1, 12, 24), "encoder_attention_mask": (first(9, of=12)).long()})


def easyanimate() -> TinyPipeline:
    """EasyAnimate: 12 text tokens and 7 of a second encoder before the video; text has projections of its own in one layer."""
    from diffusers import EasyAnimateTransformer3DModel

    transformer = denoiser(
        EasyAnimateTransformer3DModel,
        **SIZES,
        patch_size=2,
        num_layers=LAYERS,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=24,
        text_embed_dim_t5=16,
    )
    return looped(transformer, SHAPE, {**prompts(1, 12, 24), "encoder_hidden_states_t5": noise(1, 7, 16, seed=3)})


def consisid() -> TinyPipeline:
    """ConsisID: 12 text tokens before the video, and a face in cross-attention."""
    from diffusers import ConsisIDTransformer3DModel

    transformer = denoiser(
        ConsisIDTransformer3DModel,
        **SIZES,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=LAYERS,
        sample_width=40,
        sample_height=28,
        sample_frames=17,
        max_text_seq_length=12,
        is_train_face=True,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=12,
        LFE_vit_dim=12,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=1,
        LFE_num_querie=4,
        LFE_output_dim=42,
        LFE_ff_mult=1,
    )
    face = {"id_cond": noise(1, 12, seed=3), "id_vit_hidden": [noise(1, 4, 12, seed=4 + i) for i in range(5)]}
    return looped(transformer, (1, 5, 4, 28, 40), {**prompts(1, 12, 24), **face})


def kandinsky6() -> TinyPipeline:
    """Kandinsky 6: latents with the channels last; audio beside the video, which stays noise here."""
    from diffusers import Kandinsky6Transformer3DModel

    transformer = denoiser(Kandinsky6Transformer3DModel, **KANDINSKY, visual_cond=False, in_audio_dim=4, out_audio_dim=4)
    inputs = {**prompts(1, 12, 24), "pooled_projections": noise(1, 12), "audio_hidden_states": noise(1, 26, 4, seed=3)}
    return looped(with_louder_values(without_zeros(transformer)), (1, 5, 28, 40, 4), inputs)


def minimax_h3(keyframe: bool = False) -> TinyPipeline:
    """MiniMax H3: 12 text, 70 reference and 26 audio tokens before the video, 12 blocks; or a keyframe of 14 x 20 as reference."""
    from diffusers import MiniMaxH3Transformer3DModel

    transformer = denoiser(
        MiniMaxH3Transformer3DModel,
        **ATTENTION,
        hidden_size=40,
        num_layers=LAYERS,
        num_refiner_layers=1,
        ffn_dim=40,
        in_channels=4,
        audio_in_channels=4,
        text_dim=24,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=4,
    )
    text, reference, audio, video = 12, 280 if keyframe else 70, 26, 5 * 14 * 20
    tags = torch.tensor([1] * text + [0] * reference + [2] * audio + [0] * video)
    times, rows, columns = torch.arange(5.0) * 4 + text, torch.linspace(-1, 1, 14), torch.linspace(-1, 1, 20)
    positions = torch.cat([noise(text + reference + audio, 3), torch.cartesian_prod(times, rows, columns)])
    if keyframe:
        positions[text : text + reference] = torch.cartesian_prod(times[1:2], rows, columns)
    inputs = {
        **prompts(1, text, 24),
        "audio_hidden_states": noise(1, audio, 4, seed=3),
        "reference": noise(1, reference, 16, seed=4),
        "timestep_indices": torch.zeros(len(tags), dtype=torch.long),
        "token_tags": tags,
        "position_ids": positions,
        **{f"{name}_indices": (tags == tag).nonzero().flatten() for tag, name in enumerate(("video", "text", "audio"))},
    }
    return looped(with_louder_values(without_zeros(transformer)), (1, video, 16), inputs, predict=_behind_reference)


def _behind_reference(transformer: Any, latents: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
    reference = inputs.pop("reference")
    rows: Tensor = transformer(hidden_states=torch.cat([reference, latents], 1), timestep=timestep / 1000, **inputs, return_dict=False)[0]
    return rows[:, reference.shape[1] :]


def _without_tuple(transformer: Any, latents: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
    output: Tensor = transformer(hidden_states=latents, timestep=timestep, **inputs, return_dict=False)
    return output
