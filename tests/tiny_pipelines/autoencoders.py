"""VAEs that hardly compute anything."""

from __future__ import annotations

from typing import Any


def flat_autoencoder() -> Any:
    """One that makes one latent of a pixel."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,),
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def flux2_autoencoder() -> Any:
    """Flux 2's with one level."""
    from diffusers import AutoencoderKLFlux2

    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",), "block_out_channels": (8,)}
    return AutoencoderKLFlux2(**blocks, latent_channels=4, norm_num_groups=2)


def qwen_autoencoder(widths: list[int]) -> Any:
    """Qwen-Image's, with a level for each width after the first; each halves the size."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=widths,
        num_res_blocks=1,
        temperal_downsample=[level > 0 for level in range(len(widths) - 1)],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
