"""The model of the package, for demonstrations and tests: a small Wan pipeline on which sparse attention has something to drop.

Trained weights live in the package as `demo_weights`. Where they are absent, a pipeline of the same shape with random weights is built
once, by the same code path as any model (`save_pretrained`), and kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from ditattn.errors import ModelNotLoaded
from ditattn.hosts.diffusers.load import no_loading_bars

__all__ = ["CAPTION", "DEFAULTS", "DemoModel", "build_random_model", "find_demo_model", "unknown_words"]

DEFAULTS: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_frames": 17,
    "fps": 8,
    "num_inference_steps": 24,
    "guidance_scale": 3.0,
}
"""What the demo model is made for: 17 frames of 64 x 64 are 17 x 16 x 16 = 4352 tokens, 34 blocks of 128."""

CAPTION = "a big red circle moves right on a blue background"
"""The form of the captions that it understands."""

TRAINED = Path(__file__).resolve().parents[2] / "demo_weights"

LATENT_CHANNELS = 12

RANDOM_MODEL: dict[str, Any] = {
    "seed": 0,
    "words": (
        "a moves on background and red green blue yellow orange purple white black circle square triangle left right up down "
        "striped small big"
    ),
    "text_encoder": {"vocab_size": 64, "d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0},
    "transformer": {
        "patch_size": [1, 2, 2],
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "text_dim": 64,
        "freq_dim": 256,
        "ffn_dim": 1024,
        "num_layers": 4,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 256,
    },
    "vae": {
        "base_dim": 32,
        "z_dim": LATENT_CHANNELS,
        "dim_mult": [1],
        "num_res_blocks": 1,
        "attn_scales": [],
        "temperal_downsample": [],
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_temporal": 1,
        "scale_factor_spatial": 2,
        "latents_mean": [0.0] * LATENT_CHANNELS,
        "latents_std": [1.0] * LATENT_CHANNELS,
    },
    "shift": 6.0,
}


@dataclass(frozen=True)
class DemoModel:
    """Where the demo model is, and whether its weights mean anything."""

    path: Path
    random_weights: bool


def find_demo_model() -> DemoModel:
    """The trained model of the package, or the random one, built now if this is the first time.

    Raises:
        ModelNotLoaded: the cache folder cannot be written.
    """
    if (TRAINED / "model_index.json").is_file():
        return DemoModel(TRAINED, random_weights=False)
    path = cache_folder() / f"random-wan-{_fingerprint()}"
    if not (path / "model_index.json").is_file():
        try:
            _build_atomically(path)
        except OSError as error:
            raise ModelNotLoaded(f"cannot write the demo model to {path.parent}: {error.strerror or error}; set XDG_CACHE_HOME") from error
    return DemoModel(path, random_weights=True)


def unknown_words(model: DemoModel, caption: str) -> list[str]:
    """Words of a caption that the demo model's tokenizer does not know, each once: to the model they are all the same."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model.path / "tokenizer" / "tokenizer.json"))
    encoded, unknown = tokenizer.encode(caption), tokenizer.token_to_id("<unk>")
    tokens = zip(encoded.ids, encoded.offsets, strict=True)
    found = dict.fromkeys(caption[start:stop] for number, (start, stop) in tokens if number == unknown)
    return [word for word in found if any(map(str.isalnum, word))]


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/ditattn`, or `~/.cache/ditattn`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditattn"


def build_random_model(folder: Path, recipe: dict[str, Any] = RANDOM_MODEL) -> None:
    """Write a Wan pipeline with random weights to `folder`. The same recipe gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe["seed"])
        pipe = diffusers.WanPipeline(
            tokenizer=_tokenizer(recipe["words"].split()),
            text_encoder=_text_encoder(recipe["text_encoder"]),
            vae=diffusers.AutoencoderKLWan(**recipe["vae"]),
            transformer=diffusers.WanTransformer3DModel(**recipe["transformer"]),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=recipe["shift"]),
        )
    with no_loading_bars():
        pipe.save_pretrained(folder)
    _name_tokenizer_class(folder / "model_index.json")


def _build_atomically(path: Path) -> None:
    """Build beside the target, then rename: two processes that build at once both end with a whole model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        build_random_model(draft)
        try:
            draft.rename(path)
        except OSError:
            # another process was first
            if not (path / "model_index.json").is_file():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _fingerprint() -> str:
    text = json.dumps([RANDOM_MODEL, diffusers.__version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _tokenizer(words: list[str]) -> Any:
    """One word, one token; a sentence ends with </s>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def _text_encoder(config: dict[str, Any]) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(**config)).eval()


def _name_tokenizer_class(index: Path) -> None:
    """transformers 5 records a class that older versions do not know."""
    content = json.loads(index.read_text(encoding="utf-8"))
    content["tokenizer"][1] = "PreTrainedTokenizerFast"
    index.write_text(json.dumps(content, indent=2), encoding="utf-8")
