"""Transformers of diffusers that are not served, and why: one sentence each, so that none is missing in silence.

`tests/hosts/diffusers/test_every_transformer.py` walks the transformers of the installed diffusers: each is of a family or stands here.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["NOT_SERVED"]

NOT_DESCRIBED = "where its tokens stand has not been described yet"
AUDIO = "its tokens are audio, which has no rows and columns to choose blocks of"
LINEAR = "its self-attention is linear, without a softmax whose blocks could be dropped"
SHORT_SEQUENCES = "its attention runs within a frame, or along time for each place, so sequences are too short to gain from dropping blocks"

NOT_SERVED: Mapping[str, str] = {
    "AceStepTransformer1DModel": AUDIO,
    "AnyFlowFARTransformer3DModel": "it makes chunk after chunk, causally, with a FlexAttention mask that is no tensor and cached keys",
    "BriaFibo2Transformer2DModel": "how many summary tokens stand before its image is decided inside its forward",
    "Cosmos3OmniTransformer": "its queries are the video and its keys text and video: lengths that differ, for which no plan is made yet",
    "DiTTransformer2DModel": "its images have 1024 tokens at most, too few to gain from dropping blocks",
    "DreamLiteTransformer2DModel": "it is a block of a U-Net, whose sequences differ in length from block to block",
    "Kandinsky6SRTransformer3DModel": "it has a sparse attention of its own, with FlexAttention masks that are no tensors",
    "LatteTransformer3DModel": SHORT_SEQUENCES,
    "LongCatAudioDiTTransformer": AUDIO,
    "MiniMaxMusic3RVQDepthDecoder": "it decodes a few audio codes one after the other, causally",
    "MiniMaxMusic3Transformer1DModel": AUDIO,
    "OmniGenTransformer2DModel": "its text looks back only, by a mask of query and key that block-sparse kernels do not take",
    "PriorTransformer": "its sequence is a prompt and one embedding of an image",
    "RFD4ProteinaTransformer": "its tokens are residues of a protein, and every pair of them adds a bias to the softmax",
    "SanaTransformer2DModel": LINEAR,
    "SanaVideoTransformer3DModel": LINEAR,
    "SanaWMLTX2RefinerTransformer3DModel": "it refines a few frames at a time, whose queries look at cached keys of a sliding window",
    "SanaWMTransformer3DModel": "three layers of four are linear recurrences; the fourth calls torch's SDPA outside an attention processor",
    "StableAudio3DiTModel": AUDIO,
    "StableAudioDiTModel": AUDIO,
    "T5FilmDecoder": "its tokens are the spectrogram of notes, without rows and columns to choose blocks of",
    "Transformer2DModel": "it is a block of a U-Net, whose sequences differ in length from block to block",
    "TransformerTemporalModel": SHORT_SEQUENCES,
    "WanAnimate2Transformer3DModel": "its queries look at cached keys of the reference too, by a FlexAttention mask that is no tensor",
}
"""By class name; a class leaves when its family comes."""
