"""A tokenizer of letters and a one-layer text encoder, for the pipelines that are to run from a prompt."""

from __future__ import annotations

import string
from typing import Any

TEXT_DIM = 24


def tokenizer() -> Any:
    """One token per letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *string.ascii_lowercase])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64)


def text_encoder() -> Any:
    """UMT5 with one layer."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=40,
        d_model=TEXT_DIM,
        d_kv=6,
        d_ff=40,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return UMT5EncoderModel(config)
