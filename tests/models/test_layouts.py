"""Where every family's tokens stand, read from the arguments of its forward."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ditattn.models import MODELS, TokenLayout, find_family
from ditattn.models.anyflow import ANYFLOW
from ditattn.models.aura_flow import AURA_FLOW
from ditattn.models.base import ModelFamily
from ditattn.models.bria import BRIA
from ditattn.models.chroma import CHROMA
from ditattn.models.cogvideox import COGVIDEOX
from ditattn.models.cogview4 import COGVIEW4
from ditattn.models.easyanimate import EASYANIMATE
from ditattn.models.ernie_image import ERNIE_IMAGE
from ditattn.models.flux import FLUX
from ditattn.models.flux2 import FLUX2
from ditattn.models.flux3 import FLUX3
from ditattn.models.glm_image import GLM_IMAGE
from ditattn.models.helios import HELIOS
from ditattn.models.hidream_image import HIDREAM_IMAGE
from ditattn.models.hunyuan_image import HUNYUAN_IMAGE
from ditattn.models.hunyuan_video import HUNYUAN_VIDEO
from ditattn.models.hunyuan_video15 import HUNYUAN_VIDEO_15
from ditattn.models.hunyuan_video_framepack import HUNYUAN_VIDEO_FRAMEPACK
from ditattn.models.joyimage import JOYIMAGE
from ditattn.models.kandinsky5 import KANDINSKY5
from ditattn.models.kandinsky6 import KANDINSKY6
from ditattn.models.krea2 import KREA2
from ditattn.models.longcat_image import LONGCAT_IMAGE
from ditattn.models.ltx2 import LTX2
from ditattn.models.ltx_video import LTX_VIDEO
from ditattn.models.lumina2 import LUMINA2
from ditattn.models.minimax_h3 import MINIMAX_H3
from ditattn.models.motif_video import MOTIF_VIDEO
from ditattn.models.nucleusmoe_image import NUCLEUSMOE_IMAGE
from ditattn.models.ovis_image import OVIS_IMAGE
from ditattn.models.pixart import PIXART
from ditattn.models.prx import PRX
from ditattn.models.qwen_image import QWEN_IMAGE
from ditattn.models.qwen_image21 import QWEN_IMAGE21
from ditattn.models.stable_diffusion_3 import STABLE_DIFFUSION_3
from ditattn.models.wan import WAN
from ditattn.models.wan_animate import WAN_ANIMATE
from ditattn.models.wan_vace import WAN_VACE
from ditattn.models.z_image import Z_IMAGE
from ditattn.plan.token_grids import TokenGrid


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
    assert flux(ids, 39) == TokenLayout((2, 64, 1, 4, 6), (1, 1, 1), 10, 15, (TokenGrid(34, (1, 3, 5)),))


def test_flux_references_are_told_apart_by_their_number() -> None:
    """Some loops put several references side by side in the plane of positions: what counts is that each is a grid."""
    beside = image_ids(2, 5, image=2)
    beside[:, 1:] += torch.tensor([3, 7])
    ids = torch.cat([image_ids(4, 6), image_ids(3, 5, image=1), beside])
    grids = (TokenGrid(34, (1, 3, 5)), TokenGrid(49, (1, 2, 5)))
    assert flux(ids, 49) == TokenLayout((2, 64, 1, 4, 6), (1, 1, 1), 10, 25, grids)


@pytest.mark.parametrize("spoil", [lambda ids: ids[:-1], lambda ids: ids.flip(0), lambda ids: ids[:, [0, 2, 1]]])
def test_a_flux_reference_that_is_no_grid_is_kept_whole(spoil: Callable[[Tensor], Tensor]) -> None:
    reference = spoil(image_ids(3, 5, image=1))
    ids = torch.cat([image_ids(4, 6), reference, image_ids(2, 2, image=2)])
    behind = len(reference) + 4
    assert flux(ids, len(ids)) == TokenLayout((2, 64, 1, 4, 6), (1, 1, 1), 10, behind, (TokenGrid(30 + behind, (1, 2, 2)),))


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
    layout = qwen([[(1, 4, 6), (1, 3, 5), (1, 2, 2)]] * 2, 43)
    assert layout == TokenLayout((2, 64, 1, 4, 6), (1, 1, 1), 7, 19, (TokenGrid(31, (1, 3, 5)), TokenGrid(46, (1, 2, 2))))


def test_qwen_image_refuses_fewer_tokens_than_all_images_have() -> None:
    with pytest.raises(ValueError, match="a grid of 1x3x5 tokens cannot begin at token 31 of 45"):
        qwen([[(1, 4, 6), (1, 3, 5)]], 38)


def test_qwen_image_refuses_samples_of_different_shape() -> None:
    with pytest.raises(ValueError, match="differ in img_shapes"):
        qwen([[(1, 4, 6)], [(1, 6, 4)]])


def test_qwen_image_refuses_fewer_tokens_than_the_image_has() -> None:
    with pytest.raises(ValueError, match="-4 after the video"):
        qwen([[(1, 4, 6)]], 20)


def packed(family: ModelFamily, ids: Tensor, length: int, **more: Any) -> TokenLayout:
    arguments = {"hidden_states": torch.empty(2, length, 64), "img_ids": ids, "encoder_hidden_states": torch.empty(2, 10, 8)}
    return family.layout(config(patch_size=1), {**arguments, **more})


@pytest.mark.parametrize("family", [FLUX2, FLUX3, CHROMA, BRIA, OVIS_IMAGE], ids=lambda family: family.name)
def test_relatives_of_flux_have_text_in_front_and_further_images_behind(family: ModelFamily) -> None:
    ids = torch.cat([image_ids(4, 6), image_ids(3, 5, image=10)])
    assert packed(family, ids, 39) == TokenLayout((2, 64, 1, 4, 6), (1, 1, 1), 10, 15, (TokenGrid(34, (1, 3, 5)),))
    with pytest.raises(ValueError, match="at the front"):
        packed(family, ids.flip(0), 39)


def test_flux3_takes_its_references_apart() -> None:
    found = packed(FLUX3, image_ids(4, 6), 24, image_cond_hidden_states=torch.empty(2, 15, 64))
    assert found == TokenLayout((2, 64, 1, 4, 6), (1, 1, 1), 10, 15)
    assert found.without_text() == TokenLayout((2, 64, 1, 4, 6), (1, 1, 1))


def test_longcat_image_counts_rows_from_the_length_of_its_text() -> None:
    ids = torch.cat([image_ids(4, 6, image=1), image_ids(3, 5, image=2)]) + torch.tensor([0, 512, 512])
    assert packed(LONGCAT_IMAGE, ids, 39) == TokenLayout((2, 64, 1, 4, 6), (1, 1, 1), 10, 15, (TokenGrid(34, (1, 3, 5)),))


LATENTS = {"hidden_states": torch.empty(2, 16, 8, 12), "encoder_hidden_states": torch.empty(2, 9, 4), "text_bth": torch.empty(2, 5, 4)}


@pytest.mark.parametrize(
    ("family", "prefix", "suffix"),
    [(STABLE_DIFFUSION_3, 0, 9), (AURA_FLOW, 17, 0), (COGVIEW4, 9, 0), (GLM_IMAGE, 9, 0), (PRX, 9, 0), (PIXART, 0, 0), (ERNIE_IMAGE, 0, 5)],
    ids=lambda value: str(value)[:30],
)
def test_images_of_plain_latents(family: ModelFamily, prefix: int, suffix: int) -> None:
    assert family.layout(config(patch_size=2), LATENTS) == TokenLayout((2, 16, 1, 8, 12), (1, 2, 2), prefix, suffix)


def test_hunyuan_image_has_the_texts_of_two_encoders_behind() -> None:
    second = {"encoder_hidden_states_2": torch.empty(2, 5, 4)}
    assert HUNYUAN_IMAGE.layout(config(patch_size=(1, 1)), {**LATENTS, **second}) == TokenLayout((2, 16, 1, 8, 12), (1, 1, 1), 0, 14)
    frames = {**LATENTS, "hidden_states": torch.empty(2, 16, 3, 8, 12), "encoder_hidden_states_2": None}
    assert HUNYUAN_IMAGE.layout(config(patch_size=(1, 2, 2)), frames) == TokenLayout((2, 16, 3, 8, 12), (1, 2, 2), 0, 9)
    with pytest.raises(ValueError, match="differ in their axes"):
        HUNYUAN_IMAGE.layout(config(patch_size=(1, 2, 2)), LATENTS)


def test_z_image_pads_image_and_text_to_multiples_of_32() -> None:
    arguments = {"x": [torch.empty(16, 1, 60, 88)] * 2, "cap_feats": [torch.empty(20, 8), torch.empty(33, 8)]}
    found = Z_IMAGE.layout(config(), arguments)
    assert found == TokenLayout((2, 16, 1, 60, 88), (1, 2, 2), 0, 24 + 64, num_image_suffix_tokens=24)
    assert found.without_text().num_tokens == 30 * 44 + 24
    with pytest.raises(ValueError, match="differ in size"):
        Z_IMAGE.layout(config(), {**arguments, "x": [torch.empty(16, 1, 60, 88), torch.empty(16, 1, 88, 60)]})
    with pytest.raises(AttributeError):
        Z_IMAGE.layout(config(), {**arguments, "x": [[torch.empty(16, 1, 60, 88)]]})


def test_krea2_reads_the_image_from_the_positions_behind_the_text() -> None:
    positions = torch.cat([torch.zeros(9, 3), image_ids(4, 6)])
    arguments = {"hidden_states": torch.empty(2, 24, 64), "encoder_hidden_states": torch.empty(2, 9, 3, 8), "position_ids": positions}
    assert KREA2.layout(config(), arguments) == TokenLayout((2, 64, 1, 4, 6), (1, 1, 1), 9, 0)


def test_lumina2_counts_the_real_text_only() -> None:
    arguments = {**LATENTS, "encoder_attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])}
    assert LUMINA2.layout(config(patch_size=2), arguments) == TokenLayout((2, 16, 1, 8, 12), (1, 2, 2), 3, 0)
    with pytest.raises(ValueError, match=r"differ in length: \[2, 3\]"):
        LUMINA2.layout(config(patch_size=2), {**arguments, "encoder_attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])})


@pytest.mark.parametrize(("rows", "columns", "padding"), [(8, 12, 1024 - 24), (12, 12, 0)])
def test_hidream_pads_images_that_are_not_square(rows: int, columns: int, padding: int) -> None:
    arguments = {
        "hidden_states": torch.empty(1, 16, rows, columns),
        "encoder_hidden_states_t5": torch.empty(1, 7, 8),
        "encoder_hidden_states_llama3": torch.empty(3, 1, 5, 8),
    }
    layout = HIDREAM_IMAGE.layout(config(patch_size=2, max_resolution=(64, 64)), arguments)
    assert layout == TokenLayout((1, 16, 1, rows, columns), (1, 2, 2), 0, padding + 7 + 10)
    with pytest.raises(ValueError, match="packed"):
        HIDREAM_IMAGE.layout(config(patch_size=2, max_resolution=(64, 64)), {**arguments, "hidden_states": torch.empty(1, 24, 64)})


def test_joyimage_has_the_image_first_and_given_ones_behind() -> None:
    text = {"encoder_hidden_states": torch.empty(1, 9, 4)}
    patch = config(patch_size=[1, 2, 2])
    several = JOYIMAGE.layout(patch, {**text, "hidden_states": torch.empty(1, 3, 16, 1, 8, 12)})
    assert (several.grid, several.num_prefix_tokens, several.num_suffix_tokens) == ((1, 4, 6), 0, 2 * 24 + 9)
    assert several.further_grids == (TokenGrid(24, (1, 4, 6)), TokenGrid(48, (1, 4, 6)))
    alone = JOYIMAGE.layout(patch, {**text, "hidden_states": torch.empty(1, 16, 1, 8, 12)})
    assert (alone.grid, alone.num_suffix_tokens, alone.further_grids) == ((1, 4, 6), 9, ())
    plus = {**text, "hidden_states": torch.empty(1, 50, 16, 1, 2, 2), "shape_list": [[(1, 4, 6), (1, 3, 5)]]}
    assert JOYIMAGE.layout(patch, plus) == TokenLayout((1, 16, 1, 4, 6), (1, 1, 1), 0, 26 + 9, (TokenGrid(24, (1, 3, 5)),))
    with pytest.raises(ValueError, match="differ in shape_list"):
        JOYIMAGE.layout(patch, {**plus, "shape_list": [[(1, 4, 6)], [(1, 6, 4)]]})


@pytest.mark.parametrize("shapes", [(1, 4, 6), [(1, 4, 6)], [(1, 4, 6), (1, 4, 6)]])
def test_nucleusmoe_image_has_its_text_behind(shapes: Any) -> None:
    arguments = {"hidden_states": torch.empty(2, 24, 64), "encoder_hidden_states": torch.empty(2, 9, 4), "img_shapes": shapes}
    assert NUCLEUSMOE_IMAGE.layout(config(), arguments) == TokenLayout((2, 64, 1, 4, 6), (1, 1, 1), 0, 9)
    with pytest.raises(ValueError, match="differ in img_shapes"):
        NUCLEUSMOE_IMAGE.layout(config(), {**arguments, "img_shapes": [(1, 4, 6), (1, 6, 4)]})


def test_qwen_image21_has_text_and_given_images_before_the_image() -> None:
    places = torch.tensor([[False] * 5 + [True] * 4 + [False] * 2 + [True] * 6])
    arguments = {"hidden_states": torch.empty(1, 40, 64), "img_shapes": [[(1, 4, 4), (1, 4, 6)]], "img_mask": places}
    assert QWEN_IMAGE21.layout(config(), arguments) == TokenLayout((1, 64, 1, 4, 6), (1, 1, 1), 7 + 16, 0)


@pytest.mark.parametrize(
    ("family", "alone", "joint"),
    [
        (Z_IMAGE, "noise_refiner.1.attention", "layers.1.attention"),
        (LUMINA2, "noise_refiner.1.attn", "layers.1.attn"),
        (STABLE_DIFFUSION_3, "transformer_blocks.3.attn2", "transformer_blocks.3.attn"),
        (FLUX3, "mode_blocks.image.0.attn", "single_transformer_blocks.0.attn"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_layers_of_the_image_alone_are_told_from_joint_ones(family: ModelFamily, alone: str, joint: str) -> None:
    assert family.is_self_attention(alone)
    assert family.is_self_attention(joint)
    assert family.is_image_only(alone)
    assert not family.is_image_only(joint)


def test_ltx_video_takes_its_sizes_in_tokens() -> None:
    assert ltx(num_frames=2, height=3, width=4) == TokenLayout((2, 128, 2, 3, 4), (1, 1, 1), 0, 0)


def test_ltx_video_refuses_tokens_outside_the_grid() -> None:
    with pytest.raises(ValueError, match="24 tokens are not a grid of 2 x 3 x 3"):
        ltx(num_frames=2, height=3, width=3)


def ltx_coordinates(*grids: tuple[int, int, int, int], fps: int = 24) -> Tensor:
    """As `LTXConditionPipeline` makes them: (first frame, F, Y, X) of every grid, `(2, 3, S)`."""
    parts = []
    for first, frames, rows, columns in grids:
        time = ((torch.arange(frames) * 8 - 7).clamp(min=0) + first) / fps
        parts.append(torch.cartesian_prod(time, 32.0 * torch.arange(rows), 32.0 * torch.arange(columns)).T)
    return torch.cat(parts, 1).expand(2, -1, -1)


@pytest.mark.parametrize(
    ("grids", "video", "before", "further"),
    [
        ([(0, 4, 3, 5)], (4, 3, 5), 0, []),
        ([(0, 1, 3, 5)], (1, 3, 5), 0, []),
        ([(8, 1, 3, 5), (0, 4, 3, 5)], (4, 3, 5), 15, [(0, (1, 3, 5))]),
        ([(8, 1, 3, 5), (8, 1, 3, 5), (0, 4, 3, 5)], (4, 3, 5), 30, [(0, (1, 3, 5)), (15, (1, 3, 5))]),
        ([(8, 1, 3, 5), (16, 1, 3, 5), (24, 1, 3, 5), (0, 4, 3, 5)], (4, 3, 5), 45, [(0, (1, 3, 5)), (15, (1, 3, 5)), (30, (1, 3, 5))]),
        ([(8, 2, 3, 5), (16, 1, 3, 5), (0, 4, 3, 5)], (4, 3, 5), 45, [(0, (2, 3, 5)), (30, (1, 3, 5))]),
        ([(16, 1, 3, 5), (8, 2, 3, 5), (0, 4, 3, 5)], (4, 3, 5), 45, [(0, (1, 3, 5)), (15, (2, 3, 5))]),
        ([(0, 4, 3, 5), (0, 2, 3, 5)], (4, 3, 5), 0, [(60, (2, 3, 5))]),
        ([(8, 1, 3, 1), (0, 4, 3, 1)], (4, 3, 1), 3, [(0, (1, 3, 1))]),
        ([(8, 1, 1, 1), (0, 4, 1, 1)], (4, 1, 1), 1, [(0, (1, 1, 1))]),
    ],
)
def test_ltx_video_reads_conditions_from_coordinates(
    grids: list[Any], video: tuple[int, int, int], before: int, further: list[tuple[int, tuple[int, int, int]]]
) -> None:
    coordinates = ltx_coordinates(*grids)
    length = coordinates.shape[2]
    arguments = {"hidden_states": torch.empty(2, length, 128), "video_coords": coordinates}
    behind = length - before - video[0] * video[1] * video[2]
    expected = TokenLayout((2, 128, *video), (1, 1, 1), before, behind, tuple(TokenGrid(*grid) for grid in further))
    assert LTX_VIDEO.layout(config(patch_size=1), arguments) == expected


@pytest.mark.parametrize(
    ("coordinates", "problem"),
    [
        (ltx_coordinates((0, 4, 3, 5))[:, :, :-1], "are not a grid"),
        (ltx_coordinates((0, 4, 3, 5))[:, [0, 2, 1]], "are not a grid"),
        (torch.cat([ltx_coordinates((0, 4, 3, 5))[:1], ltx_coordinates((8, 4, 3, 5))[:1]]), "samples of one batch differ"),
    ],
    ids=["a token is missing", "column by column", "samples differ"],
)
def test_ltx_video_refuses_coordinates_that_are_no_grid(coordinates: Tensor, problem: str) -> None:
    arguments = {"hidden_states": torch.empty(2, coordinates.shape[2], 128), "video_coords": coordinates}
    with pytest.raises(ValueError, match=problem):
        LTX_VIDEO.layout(config(patch_size=1), arguments)


@pytest.mark.parametrize("sizes", [{}, {"num_frames": None, "height": None, "width": None}])
def test_ltx_video_refuses_a_call_without_sizes_and_coordinates(sizes: dict[str, None]) -> None:
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


VIDEO = torch.empty(1, 4, 5, 32, 48)


def text(length: int, batch: int = 1) -> Tensor:
    return torch.empty(batch, length, 8)


def test_hunyuan_video_15_has_image_and_two_texts_behind() -> None:
    arguments = {"hidden_states": VIDEO, "image_embeds": text(7), "encoder_hidden_states_2": text(5), "encoder_hidden_states": text(12)}
    layout = HUNYUAN_VIDEO_15.layout(config(patch_size=1, patch_size_t=1), arguments)
    assert layout == TokenLayout((1, 4, 5, 32, 48), (1, 1, 1), 0, 24)


@pytest.mark.parametrize(("image", "real"), [(0.0, 3 + 9), (1.0, 3 + 9 + 7)], ids=["text to video", "image to video"])
def test_hunyuan_video_15_knows_which_tokens_are_real(image: float, real: int) -> None:
    arguments = {
        "hidden_states": torch.empty(2, 4, 1, 2, 3),
        "image_embeds": torch.full((2, 7, 8), image),
        "encoder_hidden_states_2": text(5, 2),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]),
        "encoder_hidden_states": text(12, 2),
        "encoder_attention_mask": (torch.arange(12) < torch.tensor([[9], [2]])).long(),
    }
    keep = HUNYUAN_VIDEO_15.key_mask(config(patch_size=1, patch_size_t=1), arguments)
    assert keep is not None
    assert keep.shape == (2, 6 + 24)
    assert torch.equal(keep[0], torch.arange(30) < 6 + real)
    assert int(keep[1].sum()) == 6 + real - 9


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
        **{f"indices_latents_{name}": torch.zeros(2) for name in ("clean", "history_2x", "history_4x")},
    }
    layout = HUNYUAN_VIDEO_FRAMEPACK.layout(config(patch_size=2, patch_size_t=1), arguments)
    # 30 x 44 latents do not fill patches of 4 and of 8: they are padded
    assert (layout.num_prefix_tokens, layout.num_suffix_tokens) == (2 * 15 * 22 + 1 * 8 * 11 + 4 * 4 * 6, behind)
    # the oldest first
    assert layout.further_grids == (TokenGrid(0, (4, 4, 6)), TokenGrid(96, (1, 8, 11)), TokenGrid(96 + 88, (2, 15, 22)))
    without = HUNYUAN_VIDEO_FRAMEPACK.layout(config(patch_size=2, patch_size_t=1), {**arguments, "indices_latents_history_2x": None})
    assert without.further_grids == (TokenGrid(0, (4, 4, 6)), TokenGrid(96, (2, 15, 22)))


def test_helios_takes_a_history_only_with_its_indices() -> None:
    arguments = {
        "hidden_states": VIDEO,
        "latents_history_short": torch.empty(1, 4, 1, 32, 48),
        "indices_latents_history_short": torch.zeros(1, 1),
        "latents_history_mid": torch.empty(1, 4, 2, 32, 48),
        "indices_latents_history_mid": None,
    }
    layout = HELIOS.layout(config(patch_size=(1, 2, 2)), arguments)
    assert (layout.num_prefix_tokens, layout.further_grids) == (16 * 24, (TokenGrid(0, (1, 16, 24)),))


@pytest.mark.parametrize("image", [None, text(6)], ids=["text only", "with an image"])
def test_motif_video_has_image_and_text_behind(image: Tensor | None) -> None:
    arguments = {"hidden_states": VIDEO, "encoder_hidden_states": text(12), "image_embeds": image}
    layout = MOTIF_VIDEO.layout(config(patch_size=2, patch_size_t=1), arguments)
    assert (layout.num_prefix_tokens, layout.num_suffix_tokens) == (0, 12 if image is None else 18)


@pytest.mark.parametrize("second", [None, text(7)], ids=["one encoder", "two encoders"])
def test_easyanimate_has_its_texts_in_front(second: Tensor | None) -> None:
    arguments = {"hidden_states": VIDEO, "encoder_hidden_states": text(12), "encoder_hidden_states_t5": second}
    layout = EASYANIMATE.layout(config(patch_size=2), arguments)
    assert (layout.num_prefix_tokens, layout.num_suffix_tokens) == (12 if second is None else 19, 0)


def test_ltx2_has_keyframes_behind() -> None:
    arguments = {"hidden_states": torch.empty(2, 30, 128), "num_frames": 2, "height": 3, "width": 4}
    assert LTX2.layout(config(), arguments) == TokenLayout((2, 128, 2, 3, 4), (1, 1, 1), 0, 6)
    with pytest.raises(ValueError, match="-18 after the video"):
        LTX2.layout(config(), {**arguments, "height": 6})


# of LTX 2's video: the first frame of its latents is one frame, the others are eight
TIMES = torch.tensor([0.0, 1, 9, 17]) / 24


def ltx2_coordinates(*grids: tuple[Tensor, int, int, float]) -> Tensor:
    """(times, Y, X, pixels of a row) of every grid, as LTX 2's pipelines make them: `(1, 3, S, 2)`, where tokens begin and end."""
    starts = [torch.cartesian_prod(times, *(torch.arange(n) * pixels for n in (y, x))) for times, y, x, pixels in grids]
    return torch.stack([torch.cat(starts).T, torch.cat(starts).T + 1], dim=-1)[None]


LTX2_BESIDE = {
    "two keyframes": ([(TIMES[3:], 3, 4, 32.0), (TIMES[1:2], 3, 4, 32.0)], [(1, 3, 4), (1, 3, 4)]),
    "keyframes in the order of time": ([(TIMES[1:2], 3, 4, 32.0), (TIMES[3:] + 2, 3, 4, 32.0)], [(1, 3, 4), (1, 3, 4)]),
    "a keyframe at the same time twice": ([(TIMES[3:], 3, 4, 32.0)] * 2, [(1, 3, 4), (1, 3, 4)]),
    "a reference of the video's length": ([(TIMES, 3, 4, 32.0)], [(4, 3, 4)]),
    "a reference at half the size": ([(TIMES, 2, 2, 64.0)], [(4, 2, 2)]),
    "a keyframe before a reference": ([(TIMES[2:3], 3, 4, 32.0), (TIMES, 2, 2, 64.0)], [(1, 3, 4), (4, 2, 2)]),
}


@pytest.mark.parametrize("name", LTX2_BESIDE)
def test_ltx2_reads_what_stands_beside_its_video(name: str) -> None:
    beside, sizes = LTX2_BESIDE[name]
    coordinates = ltx2_coordinates((TIMES, 3, 4, 32.0), *beside)
    arguments = {"hidden_states": torch.empty(2, coordinates.shape[2], 128), "num_frames": 4, "height": 3, "width": 4}
    layout = LTX2.layout(config(), {**arguments, "video_coords": coordinates.repeat(2, 1, 1, 1)})
    assert [grid.size for grid in layout.further_grids] == sizes
    assert [grid.start for grid in layout.further_grids] == [48, *(grid.stop for grid in layout.further_grids)][:-1]
    assert layout.num_tokens == coordinates.shape[2]


def test_ltx2_keeps_whole_what_is_no_grid() -> None:
    coordinates = ltx2_coordinates((TIMES, 3, 4, 32.0), (TIMES[1:2], 3, 4, 32.0))
    arguments = {"hidden_states": torch.empty(2, 60, 128), "num_frames": 4, "height": 3, "width": 4}
    # a token of a place that the others leave out
    torn = coordinates.clone()
    torn[0, 2, 50] += 0.5
    assert LTX2.layout(config(), {**arguments, "video_coords": torn}).further_grids == ()
    differing = torch.cat([coordinates, coordinates + 1])
    assert LTX2.layout(config(), {**arguments, "video_coords": differing}).further_grids == ()


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


def test_minimax_h3_reads_keyframes_and_references() -> None:
    """Two keyframes, audio, a picture of another size, a video with its sound before it, audio, the video."""
    rows, columns = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([-1.0, -0.5, 0.5, 1.0])

    def frames(*times: float) -> Tensor:
        return torch.cartesian_prod(torch.tensor(times), rows, columns)

    sound, text = torch.zeros(5, 3), torch.arange(3.0)[:, None].expand(3, 3)
    picture = torch.cartesian_prod(torch.tensor([4.0]), torch.tensor([-2.0, 2.0]), torch.tensor([-1.0, 1.0]))
    parts = [(1, text), (0, frames(3.0)), (0, frames(11.0)), (2, sound), (0, picture), (2, sound), (0, frames(5.0, 9.0, 13.0)), (2, sound)]
    parts += [(0, frames(7.0, 11.0, 15.0))]
    tags = torch.cat([torch.full((len(part),), tag) for tag, part in parts])
    positions = torch.cat([part for _, part in parts])
    arguments = {"position_ids": positions, "token_tags": tags, "hidden_states": torch.empty(1, len(tags), 16)}
    layout = MINIMAX_H3.layout(config(), arguments)
    assert layout.grid == (3, 3, 4)
    assert layout.num_prefix_tokens == len(tags) - 36
    assert layout.further_grids == (
        TokenGrid(3, (1, 3, 4)),
        TokenGrid(15, (1, 3, 4)),
        TokenGrid(32, (1, 2, 2)),
        TokenGrid(41, (3, 3, 4)),
    )


def test_minimax_h3_refuses_a_sequence_without_video() -> None:
    with pytest.raises(ValueError, match="no video"):
        h3(GRID[:0])
