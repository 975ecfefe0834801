"""An `AutoencoderKLWan` that is exactly linear: a PCA of 2x2 pixel blocks written into its weights, without training."""

import random
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify

from demo_model import world

LATENT_CHANNELS = 12
# a constant hidden channel, much larger than the data, keeps the RMS norm from depending on the data
CONSTANT = 40.0


def _make_linear(net: Any, num_in: int, num_out: int, matrix: torch.Tensor, bias: torch.Tensor) -> None:
    """Let an encoder or decoder compute matrix @ x + bias at every position; its hidden state is [+x, -x, CONSTANT, 0...]."""
    width = net.conv_in.weight.shape[0]
    # a residual block or attention whose last layer is zero returns its input
    for name, module in net.named_modules():
        if name.endswith(("conv2", "proj")):
            module.weight.zero_()
            module.bias.zero_()
    for conv in (net.conv_in, net.conv_out):
        conv.weight.zero_()
        conv.bias.zero_()
    # causal convolution: the last temporal tap is the current frame
    tap = net.conv_in.weight.shape[2] - 1
    eye = torch.eye(num_in)
    net.conv_in.weight[:num_in, :, tap, 1, 1] = eye
    net.conv_in.weight[num_in : 2 * num_in, :, tap, 1, 1] = -eye
    net.conv_in.bias[2 * num_in] = CONSTANT
    # the norm divides by |x| / sqrt(width), and |x| is close to CONSTANT
    net.norm_out.gamma.fill_(CONSTANT / width**0.5)
    # silu(x) - silu(-x) = x
    net.conv_out.weight[:num_out, :num_in, tap, 1, 1] = matrix
    net.conv_out.weight[:num_out, num_in : 2 * num_in, tap, 1, 1] = -matrix
    net.conv_out.bias[:num_out] = bias


def _principal_axes(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean [12], axes [12, 12] (rows by falling variance) and variances [12] of the 2x2 pixel blocks of first frames."""
    clips = [world.place(scene, rng, wraps=True) for scene in world.training_scenes()]
    video, _ = world.render(clips, torch.zeros(1))
    blocks = patchify(video, 2).permute(1, 0, 2, 3, 4).flatten(1)
    variance, axes = torch.linalg.eigh(torch.cov(blocks))
    return blocks.mean(1), axes.flip(1).T, variance.flip(0)


@torch.no_grad()
def build_autoencoder(seed: int) -> AutoencoderKLWan:
    """Build the autoencoder for the pixels of `world`: 2x2 pixels of one frame become 12 latent channels, nothing is lost."""
    mean, axes, variance = _principal_axes(random.Random(seed))
    # half whitening, then one factor that makes the mean variance 1: no channel rules the loss, none is mere noise
    std = variance.clamp(min=1e-4) ** 0.25
    std = std * (variance / std**2).mean().sqrt()
    vae = AutoencoderKLWan(
        base_dim=32,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=1,
        scale_factor_spatial=2,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=std.tolist(),
    )
    _make_linear(vae.encoder, 12, LATENT_CHANNELS, axes, -(axes @ mean))
    _make_linear(vae.decoder, LATENT_CHANNELS, 12, axes.T, mean)
    # log-variance: drawing from the posterior adds nothing
    vae.encoder.conv_out.bias[LATENT_CHANNELS:] = -12.0
    for conv, width in ((vae.quant_conv, 2 * LATENT_CHANNELS), (vae.post_quant_conv, LATENT_CHANNELS)):
        conv.weight.copy_(torch.eye(width).view(width, width, 1, 1, 1))
        conv.bias.zero_()
    return vae.eval()


class LatentMap:
    """The autoencoder as one matrix, read back from its weights, with the pipeline's division by `latents_std`."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        channels, tap = vae.config.z_dim, vae.encoder.conv_out.weight.shape[2] - 1
        self.axes = vae.encoder.conv_out.weight[:channels, :channels, tap, 1, 1].detach().clone()
        self.mean = vae.decoder.conv_out.bias[:channels].detach().clone()
        self.std = torch.tensor(vae.config.latents_std)

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Video [B, 3, T, Y, X] in -1..1 to latents [B, 12, T, Y/2, X/2]."""
        scaled, blocks = self.axes / self.std[:, None], patchify(video, 2)
        latents: torch.Tensor = torch.einsum("oc,bcthw->bothw", scaled, blocks) - (scaled @ self.mean).view(1, -1, 1, 1, 1)
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, 12, T, Y, X] to video [B, 3, T, 2Y, 2X], clamped to -1..1."""
        latents = latents * self.std.view(1, -1, 1, 1, 1)
        pixels = torch.einsum("oc,bothw->bcthw", self.axes, latents) + self.mean.view(1, -1, 1, 1, 1)
        video: torch.Tensor = unpatchify(pixels, 2).clamp(-1, 1)
        return video
