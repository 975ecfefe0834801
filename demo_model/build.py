"""The untrained pipeline: tokenizer, text encoder, transformer with seeded heads, scheduler; and how a pipeline is saved."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from demo_model import world
from demo_model.autoencoder import LATENT_CHANNELS, build_autoencoder
from demo_model.seeded_heads import seed_heads

# sigma schedule of the pipeline: the higher, the more steps are spent on noisy latents, where the scene is decided
SCHEDULER_SHIFT = 10.0


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token; a sentence ends with `</s>`."""
    words = ["a", "big", "moves", "on", "background", *world.COLORS, *world.SHAPES, *world.DIRECTIONS]
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@torch.no_grad()
def build_text_encoder() -> UMT5EncoderModel:
    """One UMT5 layer; its position bias starts head 0 on the next word and head 1 on the previous one, colour beside noun."""
    config = UMT5Config(vocab_size=64, d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2, dropout_rate=0.0)
    encoder = UMT5EncoderModel(config)
    encoder.shared.weight.normal_(0, 1)
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    bias.zero_()
    # buckets of a bidirectional encoder: 17 is one word ahead, 1 is one word back
    bias[17, 0] = 5.0
    bias[1, 1] = 5.0
    return encoder


def _pass_through(net: Any) -> None:
    """Let patch embedding and output undo each other: at high noise the velocity is close to the noisy latents themselves."""
    into = net.patch_embedding.weight
    num_in = into[0].numel()
    axes = torch.linalg.qr(torch.randn(into.shape[0], num_in)).Q
    into.copy_(axes.view(into.shape))
    # latents lie as (channel, row, column) in the embedding, as (row, column, channel) in the output
    back = axes.unflatten(1, (-1, 4)).permute(2, 1, 0).flatten(0, 1)
    # the norm before the output scales tokens of norm sqrt(num_in) up to sqrt(width)
    net.proj_out.weight.copy_(back * (num_in / into.shape[0]) ** 0.5)
    for bias in (net.patch_embedding.bias, net.proj_out.bias):
        bias.zero_()


@torch.no_grad()
def build_transformer(num_layers: int = 4, num_heads: int = 4, ffn_dim: int = 1024, seeded: bool = True) -> WanTransformer3DModel:
    """A small `WanTransformer3DModel` (heads of 64) that starts by passing its input through; gates start small."""
    net = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=num_heads,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=64,
        freq_dim=256,
        ffn_dim=ffn_dim,
        num_layers=num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        rope_max_seq_len=256,
    )
    _pass_through(net)
    net.scale_shift_table.zero_()
    for block in net.blocks:
        block.attn2.to_out[0].weight.mul_(0.1)
        block.scale_shift_table.zero_()
    time_proj = net.condition_embedder.time_proj
    time_proj.weight.mul_(0.05)
    # of the six modulation vectors, 2 and 5 are the gates of self-attention and of the feed-forward part
    time_proj.bias.copy_(torch.tensor([0.0, 0.0, 0.2, 0.0, 0.0, 0.2]).repeat_interleave(num_heads * 64))
    if seeded:
        seed_heads(net)
    return net


def build_pipeline(seed: int, num_layers: int = 4, num_heads: int = 4, ffn_dim: int = 1024) -> WanPipeline:
    """The whole untrained pipeline, the same for the same seed; leaves torch's global random state changed."""
    torch.manual_seed(seed)
    return WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=build_text_encoder(),
        vae=build_autoencoder(seed),
        transformer=build_transformer(num_layers, num_heads, ffn_dim),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SCHEDULER_SHIFT),
    )


def save_pipeline(pipe: WanPipeline, folder: Path) -> None:
    """Write the pipeline as safetensors and JSON, with no trace of where it was loaded from."""
    pipe.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        if path.name == "model_index.json":
            # transformers 5 writes a class name that earlier releases do not know
            config["tokenizer"][1] = "PreTrainedTokenizerFast"
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
