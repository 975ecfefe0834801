"""The untrained pipeline: an exact autoencoder, seeded heads, a training forward equal to the stock one, a clean folder on disk."""

import json
import math
import random

import pytest
import torch
from diffusers import WanPipeline

from demo_model import forward, world
from demo_model.autoencoder import LatentMap
from demo_model.build import build_pipeline, save_pipeline
from demo_model.seeded_heads import OFFSETS, seed_heads

CAPTION = "a big red circle moves left on a blue background"


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline(seed=0, num_layers=2, ffn_dim=128)


def draw(num: int = 2, frames: int = 5) -> torch.Tensor:
    rng = random.Random(0)
    return world.render([world.place(scene, rng) for scene in rng.sample(world.all_scenes(), num)], torch.arange(frames))[0]


@torch.no_grad()
def test_autoencoder_gives_the_picture_back(pipe):
    video = draw()
    back = pipe.vae.decode(pipe.vae.encode(video).latent_dist.mode()).sample
    assert 10 * math.log10(4 / (back - video).square().mean()) > 45


@torch.no_grad()
def test_latent_map_is_the_autoencoder(pipe):
    video, latent_map = draw(), LatentMap(pipe.vae)
    latents = latent_map.encode(video)
    stock = pipe.vae.encode(video).latent_dist.mode() / torch.tensor(pipe.vae.config.latents_std).view(1, -1, 1, 1, 1)
    assert (latents - stock).norm() / stock.norm() < 0.01
    torch.testing.assert_close(latent_map.decode(latents), video, atol=1e-4, rtol=0)
    assert 0.5 < latents.var() < 2


def stock_velocity(pipe, x, sigma, caption, num_text):
    tokens = pipe.tokenizer([caption], return_tensors="pt")
    hidden = pipe.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, num_text - hidden.shape[1]))
    return pipe.transformer(x, sigma * 1000, hidden).sample


@pytest.mark.parametrize("caption", [CAPTION, ""])
@pytest.mark.parametrize("num_text", [32, 512])
@torch.no_grad()
def test_training_forward_is_the_stock_forward(pipe, caption, num_text):
    x, sigma = torch.randn(1, 12, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([0.6])
    tokens = pipe.tokenizer([caption], return_tensors="pt")
    num_pad = num_text - tokens.input_ids.shape[1]
    ours = forward.velocity(
        pipe.transformer, pipe.text_encoder, x, sigma, tokens.input_ids, tokens.attention_mask, num_pad, torch.arange(3)
    )
    stock = stock_velocity(pipe, x, sigma, caption, num_text)
    assert (ours - stock).norm() / stock.norm() < 0.02


@torch.no_grad()
def test_skipped_frames_carry_their_true_times(pipe):
    tables = forward.rotary_tables(pipe.transformer.rope, torch.tensor([0, 4]), 4, 4)
    every = forward.rotary_tables(pipe.transformer.rope, torch.arange(5), 4, 4)
    for some, whole in zip(tables, every, strict=True):
        assert torch.equal(some.unflatten(1, (2, 16)), whole.unflatten(1, (5, 16))[:, [0, 4]])


@torch.no_grad()
def test_seeded_heads_look_where_they_were_told():
    transformer = build_pipeline(seed=0, num_layers=1, ffn_dim=128).transformer
    attn, rope = transformer.blocks[0].attn1, transformer.rope
    cos, sin = forward.rotary_tables(rope, torch.arange(3), 8, 8)
    bias = [forward.rotate(b.view(1, 1, 4, 64).expand(1, 192, 4, 64), cos.float(), sin.float()) for b in (attn.to_q.bias, attn.to_k.bias)]
    logits = torch.einsum("bqhd,bkhd->hqk", *bias)
    query = torch.tensor([1, 4, 4])
    for head, offset in enumerate(OFFSETS[0]):
        t, y, x = (query + torch.tensor(offset)).tolist()
        assert logits[head, 64 + 4 * 8 + 4].argmax() == t * 64 + y * 8 + x


def test_seeding_leaves_global_heads_alone():
    transformer = build_pipeline(seed=0, num_layers=2, ffn_dim=128).transformer
    before = transformer.blocks[1].attn1.to_q.weight.detach().clone()
    seed_heads(transformer)
    after = transformer.blocks[1].attn1.to_q.weight
    assert OFFSETS[1][3] is None
    assert torch.equal(after[128:], before[128:])
    assert not torch.equal(after[:128], before[:128])


def test_saved_folder_is_clean_and_loads_in_the_stock_pipeline(pipe, tmp_path):
    save_pipeline(pipe, tmp_path)
    loaded = WanPipeline.from_pretrained(tmp_path)
    for path in tmp_path.rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text())
        assert str(tmp_path) not in path.read_text()
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {".json", ".safetensors"}
    loaded.set_progress_bar_config(disable=True)
    settings = {"height": 32, "width": 32, "num_frames": 2, "num_inference_steps": 2, "max_sequence_length": 32, "output_type": "np"}
    frames = [p(CAPTION, **settings, generator=torch.Generator().manual_seed(0)).frames for p in (pipe, loaded)]
    assert frames[0].shape == (1, 3, 32, 32, 3)
    for name in ("transformer", "text_encoder", "vae"):
        before, after = getattr(pipe, name).state_dict(), getattr(loaded, name).state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
    # weights that lie elsewhere in memory may be multiplied in another order, so the last bits are the processor's affair
    assert abs(frames[0] - frames[1]).max() < 1e-5
