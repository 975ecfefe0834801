"""The keys of permuted_sparse_attn."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

from pydantic import field_validator

from ditattn.backends.config import SparseAttentionConfig
from ditattn.plan.bricks import parse_bricks

__all__ = ["PermutedSparseAttentionConfig"]


class PermutedSparseAttentionConfig(SparseAttentionConfig):
    """Keys of `permuted_sparse_attn`.

    Attributes:
        token_order: always "bricks": 128 tokens that stand together in space and time, of a shape that each head chooses.
        first_frame_sink: every query keeps the blocks of a video's first frame; its own rows are chosen like others.
        bricks: the shapes to choose from, "frames x rows x columns" with a product of 128, such as "1x8x16,4x2x16"; "auto" takes what fits
            the grid.
        head_bricks: for each layer the shape of every key head, or one for all of them, separated by commas, as `tune` found them; layers
            without an entry choose from `bricks`.
        tail: a dropped block still counts through its mean key and mean value; False leaves it out.
        residual: some steps among the sparse ones run densely, and the sparse ones between them add what the sparse output of the last
            dense step lacked. `sparsity` holds for all of these steps together. The residual is kept between steps, a byte for each element
            of a layer's output and branch of guidance; "auto" does so where one takes at most 1/256 of the device's memory. Images, and
            runs in which fewer than 16 steps are free to be sparse, only add that of the last of the first dense steps; runs with fewer
            than eight, a sparsity below 1/3, and hosts that do not say which forwards belong together do without.
    """

    token_order: Literal["bricks"] = "bricks"  # type: ignore[assignment]
    bricks: str = "auto"
    head_bricks: tuple[str, ...] = ()
    tail: bool = True
    residual: bool | Literal["auto"] = "auto"

    def named_layers(self) -> Mapping[str, Collection[int]]:
        return {**super().named_layers(), "head_bricks": [layer for layer, names in enumerate(self.head_bricks) if names]}

    @property
    def outlasts_steps(self) -> bool:
        return self.residual is not False or super().outlasts_steps

    @field_validator("bricks")
    @classmethod
    def _check_bricks(cls, value: str) -> str:
        if value != "auto" and not parse_bricks(value):
            raise ValueError("name at least one shape, such as 4x2x16, or auto")
        return value

    @field_validator("head_bricks")
    @classmethod
    def _check_head_bricks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for names in value:
            parse_bricks(names)
        return value
