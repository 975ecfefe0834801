"""Where every family's tokens stand, read from the arguments of its forward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ditattn.models import MODELS, TokenLayout, find_family
from ditattn.models.anyflow import ANYFLOW
from ditattn.models.base import ModelFamily
from ditattn.models.cogvideox import COGVIDEOX
from ditattn.models.easyanimate import EASYANIMATE
from ditattn.models.flux import FLUX
from ditattn.models.helios import HELIOS
from ditattn.models.hunyuan_video import HUNYUAN_VIDEO
from ditattn.models.hunyuan_video15 import HUNYUAN_VIDEO_15
from ditattn.models.hunyuan_video_framepack import HUNYUAN_VIDEO_FRAMEPACK
from ditattn.models.kandinsky5 import KANDINSKY5
from ditattn.models.kandinsky6 import KANDINSKY6
from ditattn.models.ltx2 import LTX2
from ditattn.models.ltx_video import LTX_VIDEO
from ditattn.models.minimax_h3 import MINIMAX_H3
from ditattn.models.motif_video import MOTIF_VIDEO
from ditattn.models.qwen_image import QWEN_IMAGE
from ditattn.models.wan import WAN
from ditattn.models.wan_animate import WAN_ANIMATE
from ditattn.models.wan_vace import WAN_VACE


def config(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**values)


def image_ids(rows: int, columns: int, image: int = 0) -> Tensor:
    """Flux's (S, 3): image number, row, column."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return torch.cat([torch.full((rows * columns, 1), image), grid], 1).float()


def flux(ids: Tensor, length: int, text: int = 10) -> TokenLayout:
    arguments = {"hidden_states": torch.empty(2, length, 64), "img_ids": ids, "encoder_hidden_states": torch.empty(2, text, 8)}
    return FLUX.layout(config(patch_size=1), arguments)


def qwen(shapes: Any, length: int = 24) -> TokenLayout:
    arguments = {"hidden_states": torch.empty(2, length, 64), "img_shapes": shapes, "encoder_hidden_states": torch.empty(2, 7, 8)}
    return QWEN_IMAGE.layout(config(patch_size=2), arguments)


def ltx(**sizes: Any) -> TokenLayout:
    return LTX_VIDEO.layout(config(patch_size=1), {"hidden_states": torch.empty(2, 24, 128), **sizes})


def test_wan_is_video_only() -> None:
    layout = WAN.layout(
        config(patch_size=(1, 2, 2)), {"hidden_states": torch.empty(2, 16, 5, 32, 48), "encoder_hidden_states": torch.empty(2, 9, 4)}
    )
    assert layout == TokenLayout((2, 16, 5, 32, 48), (1, 2, 2), 0, 0)


def test_wan_refuses_a_patch_without_time() -> None:
    with pytest.raises(ValueError, match="expected 3"):
        WAN.layout(config(patch_size=(2, 2)), {"hidden_states": torch.empty(2, 16, 5, 32, 48)})


def test_hunyuan_video_has_its_text_behind() -> None:
    arguments = {"hidden_states": torch.empty(1, 4, 5, 32, 48), "encoder_hidden_states": torch.empty(1, 40, 24)}
    layout = HUNYUAN_VIDEO.layout(config(patch_size=2, patch_size_t=1), arguments)
    assert layout == TokenLayout((1, 4, 5, 32, 48), (1, 2, 2), 0, 40)


@pytest.mark.parametrize(("patch_size_t", "expected"), [(None, 1), (2, 2)])
def test_cogvideox_has_time_before_channels_and_text_in_front(patch_size_t: int | None, expected: int) -> None:
    arguments = {"hidden_states": torch.empty(1, 6, 4, 32, 48), "encoder_hidden_states": torch.empty(1, 12, 24)}
    layout = COGVIDEOX.layout(config(patch_size=2, patch_size_t=patch_size_t), arguments)
    assert layout == TokenLayout((1, 4, 6, 32, 48), (expected, 2, 2), 12, 0)


@pytest.mark.parametrize("batched", [False, True])
def test_flux_has_text_in_front(batched: bool) -> None:
    ids = image_ids(4, 6)
    assert flux(ids[None] if batched else ids, 24) == TokenLayout((2, 64, 1, 4, 6), (1, 1, 1), 10, 0)


def test_flux_kontext_has_reference_images_behind() -> None:
    ids = torch.cat([image_ids(4, 6), image_ids(3, 5, image=1)])
    assert flux(ids, 39) == TokenLayout((2, 64, 1, 4, 6), (1, 1, 1), 10, 15)


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        (torch.cat([image_ids(3, 5, image=1), image_ids(4, 6)]), "at the front"),
        (image_ids(4, 6)[:-1], "not a grid"),
        (image_ids(4, 6).flip(0), "row by row"),
        (image_ids(4, 6)[:, [0, 2, 1]], "row by row"),
        (image_ids(4, 6, image=1), "no token of the image"),
    ],
    ids=["references in front", "a token is missing", "backwards", "column by column", "references only"],
)
def test_flux_refuses_other_orders(ids: Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        flux(ids, len(ids))


def test_flux_refuses_fewer_tokens_than_positions() -> None:
    with pytest.raises(ValueError, match="-4 after the video"):
        flux(image_ids(4, 6), 20)


def test_flux_reads_new_positions_anew() -> None:
    assert flux(image_ids(4, 6), 24).raw_latent_shape[3:] == (4, 6)
    assert flux(image_ids(6, 4), 24).raw_latent_shape[3:] == (6, 4)


@pytest.mark.parametrize("shapes", [[[(1, 4, 6)], [(1, 4, 6)]], [(1, 4, 6), (1, 4, 6)], [[[1, 4, 6]]]])
def test_qwen_image_has_text_in_front(shapes: Any) -> None:
    assert qwen(shapes) == TokenLayout((2, 64, 1, 4, 6), (1, 1, 1), 7, 0)


def test_qwen_image_has_further_images_behind() -> None:
    assert qwen([[(1, 4, 6), (1, 3, 5)]] * 2, 39) == TokenLayout((2, 64, 1, 4, 6), (1, 1, 1), 7, 15)


def test_qwen_image_refuses_samples_of_different_shape() -> None:
    with pytest.raises(ValueError, match="differ in img_shapes"):
        qwen([[(1, 4, 6)], [(1, 6, 4)]])


def test_qwen_image_refuses_fewer_tokens_than_the_image_has() -> None:
    with pytest.raises(ValueError, match="-4 after the video"):
        qwen([[(1, 4, 6)]], 20)


def test_ltx_video_takes_its_sizes_in_tokens() -> None:
    assert ltx(num_frames=2, height=3, width=4) == TokenLayout((2, 128, 2, 3, 4), (1, 1, 1), 0, 0)


def test_ltx_video_refuses_tokens_outside_the_grid() -> None:
    with pytest.raises(ValueError, match="24 tokens are not a grid of 2 x 3 x 3"):
        ltx(num_frames=2, height=3, width=3)


@pytest.mark.parametrize("sizes", [{}, {"num_frames": None, "height": None, "width": None}])
def test_ltx_video_refuses_a_call_that_carries_coordinates_instead(sizes: dict[str, None]) -> None:
    with pytest.raises((KeyError, TypeError)):
        ltx(**sizes)


@pytest.mark.parametrize("family", MODELS, ids=lambda family: family.name)
def test_a_family_is_found_by_its_classes(family: ModelFamily) -> None:
    assert all(find_family(name) is family for name in family.transformer_classes)
    assert find_family(family.transformer_classes[0] + "X") is None


@pytest.mark.parametrize(
    ("family", "served", "left"),
    [
        (WAN, ["blocks.0.attn1", "blocks.39.attn1"], ["blocks.0.attn2", "blocks.0.attn1.norm_q", "vace_blocks.0.attn1"]),
        (
            HUNYUAN_VIDEO,
            ["transformer_blocks.0.attn", "single_transformer_blocks.3.attn"],
            ["context_embedder.token_refiner.refiner_blocks.0.attn", "transformer_blocks.0.attn.to_q"],
        ),
        (WAN_VACE, ["blocks.0.attn1", "vace_blocks.0.attn1"], ["vace_blocks.0.attn2", "blocks.0.attn2"]),
        (WAN_ANIMATE, ["blocks.0.attn1"], ["face_adapter.0", "blocks.0.attn2"]),
        (
            KANDINSKY5,
            ["visual_transformer_blocks.0.self_attention"],
            ["text_transformer_blocks.0.self_attention", "visual_transformer_blocks.0.cross_attention"],
        ),
        (
            KANDINSKY6,
            ["visual_transformer_blocks.0.video_dec_block.self_attention"],
            ["visual_transformer_blocks.0.audio_dec_block.self_attention", "visual_transformer_blocks.0.va_cross_attention"],
        ),
        (LTX2, ["transformer_blocks.2.attn1"], ["transformer_blocks.2.audio_attn1", "transformer_blocks.2.audio_to_video_attn"]),
        (MINIMAX_H3, ["transformer_blocks.0.attn"], ["token_refiner.blocks.0.attn"]),
        (LTX_VIDEO, ["transformer_blocks.2.attn1"], ["transformer_blocks.2.attn2"]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_self_attention_is_told_from_the_rest(family: ModelFamily, served: list[str], left: list[str]) -> None:
    assert all(map(family.is_self_attention, served))
    assert not any(map(family.is_self_attention, left))


def test_anyflow_has_time_before_channels() -> None:
    layout = ANYFLOW.layout(config(patch_size=(1, 2, 2)), {"hidden_states": torch.empty(2, 5, 16, 32, 48)})
    assert layout == TokenLayout((2, 16, 5, 32, 48), (1, 2, 2), 0, 0)


def test_the_control_branch_of_vace_runs_before_the_other_blocks() -> None:
    layers = {0: "blocks.0.attn1", 1: "blocks.1.attn1", 3: "vace_blocks.1.attn1", 2: "vace_blocks.0.attn1"}
    assert WAN_VACE.in_running_order(layers) == [2, 3, 0, 1]
    assert WAN.in_running_order({1: "blocks.1.attn1", 0: "blocks.0.attn1"}) == [0, 1]


LATENTS = torch.empty(1, 4, 5, 32, 48)


def text(length: int, batch: int = 1) -> Tensor:
    return torch.empty(batch, length, 8)


def test_hunyuan_video_15_has_image_and_two_texts_behind() -> None:
    arguments = {"hidden_states": LATENTS, "image_embeds": text(7), "encoder_hidden_states_2": text(5), "encoder_hidden_states": text(12)}
    layout = HUNYUAN_VIDEO_15.layout(config(patch_size=1, patch_size_t=1), arguments)
    assert layout == TokenLayout((1, 4, 5, 32, 48), (1, 1, 1), 0, 24)


@pytest.mark.parametrize(("batch", "behind"), [(1, 6 + 25), (2, 6 + 40)], ids=["padded text is cut off", "a batch keeps it"])
def test_framepack_has_earlier_frames_in_front(batch: int, behind: int) -> None:
    mask = (torch.arange(40) < 25).long()[None].repeat(batch, 1)
    arguments = {
        "hidden_states": torch.empty(batch, 4, 9, 30, 44),
        "image_embeds": text(6, batch),
        "encoder_attention_mask": mask,
        "latents_clean": torch.empty(batch, 4, 2, 30, 44),
        "latents_history_2x": torch.empty(batch, 4, 2, 30, 44),
        "latents_history_4x": torch.empty(batch, 4, 16, 30, 44),
    }
    layout = HUNYUAN_VIDEO_FRAMEPACK.layout(config(patch_size=2, patch_size_t=1), arguments)
    # 30 x 44 latents do not fill patches of 4 and of 8: they are padded
    assert (layout.num_prefix_tokens, layout.num_suffix_tokens) == (2 * 15 * 22 + 1 * 8 * 11 + 4 * 4 * 6, behind)


def test_helios_takes_a_history_only_with_its_indices() -> None:
    arguments = {
        "hidden_states": LATENTS,
        "latents_history_short": torch.empty(1, 4, 1, 32, 48),
        "indices_latents_history_short": torch.zeros(1, 1),
        "latents_history_mid": torch.empty(1, 4, 2, 32, 48),
        "indices_latents_history_mid": None,
    }
    assert HELIOS.layout(config(patch_size=(1, 2, 2)), arguments).num_prefix_tokens == 16 * 24


@pytest.mark.parametrize("image", [None, text(6)], ids=["text only", "with an image"])
def test_motif_video_has_image_and_text_behind(image: Tensor | None) -> None:
    arguments = {"hidden_states": LATENTS, "encoder_hidden_states": text(12), "image_embeds": image}
    layout = MOTIF_VIDEO.layout(config(patch_size=2, patch_size_t=1), arguments)
    assert (layout.num_prefix_tokens, layout.num_suffix_tokens) == (0, 12 if image is None else 18)


@pytest.mark.parametrize("second", [None, text(7)], ids=["one encoder", "two encoders"])
def test_easyanimate_has_its_texts_in_front(second: Tensor | None) -> None:
    arguments = {"hidden_states": LATENTS, "encoder_hidden_states": text(12), "encoder_hidden_states_t5": second}
    layout = EASYANIMATE.layout(config(patch_size=2), arguments)
    assert (layout.num_prefix_tokens, layout.num_suffix_tokens) == (12 if second is None else 19, 0)


def test_ltx2_has_keyframes_behind() -> None:
    arguments = {"hidden_states": torch.empty(2, 30, 128), "num_frames": 2, "height": 3, "width": 4}
    assert LTX2.layout(config(), arguments) == TokenLayout((2, 128, 2, 3, 4), (1, 1, 1), 0, 6)
    with pytest.raises(ValueError, match="-18 after the video"):
        LTX2.layout(config(), {**arguments, "height": 6})


def test_kandinsky5_has_channels_last_and_refuses_its_own_sparse_attention() -> None:
    arguments = {"hidden_states": torch.empty(1, 5, 32, 48, 4), "sparse_params": None}
    assert KANDINSKY5.layout(config(patch_size=(1, 2, 2)), arguments) == TokenLayout((1, 4, 5, 32, 48), (1, 2, 2))
    with pytest.raises(ValueError, match="8 x 8 squares"):
        KANDINSKY5.layout(config(patch_size=(1, 2, 2)), {**arguments, "sparse_params": {"to_fractal": True}})


def h3(video: Tensor, before: int = 9) -> TokenLayout:
    """Nine tokens before the video: text, two of a reference, audio."""
    tags = torch.tensor([1] * 3 + [0] * 2 + [2] * (before - 5) + [0] * len(video))
    positions = torch.cat([torch.zeros(before, 3), video])
    return MINIMAX_H3.layout(config(), {"position_ids": positions, "token_tags": tags, "hidden_states": torch.empty(1, len(video) + 2, 16)})


GRID = torch.cartesian_prod(torch.tensor([7.0, 11.0]), torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([-1.0, -0.5, 0.5, 1.0]))


def test_minimax_h3_ends_with_its_video() -> None:
    assert h3(GRID) == TokenLayout((1, 16, 2, 3, 4), (1, 1, 1), 9, 0)


@pytest.mark.parametrize("video", [GRID[:-1], GRID[:, [0, 2, 1]].contiguous(), GRID.flip(0)[:5]], ids=["short", "columns first", "part"])
def test_minimax_h3_refuses_what_is_no_grid(video: Tensor) -> None:
    with pytest.raises(ValueError, match="no grid"):
        h3(video)


def test_minimax_h3_refuses_a_sequence_without_video() -> None:
    with pytest.raises(ValueError, match="no video"):
        h3(GRID[:0])
