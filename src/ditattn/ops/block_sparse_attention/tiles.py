"""Tile shapes of the Triton kernel: a literal table per NVIDIA architecture, so that no first call tunes for minutes.

Every entry is compiled in the tests: it must not spill registers and must fit the part's shared memory. None has been timed on a card yet.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["INTERPRETER", "SHARED_MEMORY_BYTES", "TABLE", "Tiles", "architecture", "tiles_for"]


@dataclass(frozen=True)
class Tiles:
    """How one program works through its 128 query rows.

    Attributes:
        keys: keys per step; divides the block of 128.
        num_warps: warps per program.
        num_stages: steps whose loads are in flight.
        descriptors: keys and values come through tensor descriptors (the TMA unit) instead of one address per row.
    """

    keys: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


# for CPU tensors in triton's interpreter: as few steps as possible
INTERPRETER = Tiles(keys=128, num_warps=4, num_stages=1)

# shared memory that one program may use
SHARED_MEMORY_BYTES: dict[int, int] = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

# (architecture, head size): A100, other Ampere and Ada, Hopper, Blackwell in data centres and elsewhere.
# A head size without an entry takes that of the next power of two.
TABLE: dict[tuple[int, int], Tiles] = {
    (80, 32): Tiles(keys=64, num_warps=8, num_stages=3),
    (80, 64): Tiles(keys=64, num_warps=8, num_stages=3),
    (80, 128): Tiles(keys=32, num_warps=8, num_stages=4),
    (86, 32): Tiles(keys=64, num_warps=8, num_stages=2),
    (86, 64): Tiles(keys=64, num_warps=8, num_stages=2),
    (86, 128): Tiles(keys=32, num_warps=8, num_stages=3),
    (90, 32): Tiles(keys=128, num_warps=8, num_stages=3, descriptors=True),
    (90, 64): Tiles(keys=128, num_warps=4, num_stages=3, descriptors=True),
    (90, 128): Tiles(keys=128, num_warps=8, num_stages=3, descriptors=True),
    (100, 32): Tiles(keys=128, num_warps=8, num_stages=3, descriptors=True),
    (100, 64): Tiles(keys=128, num_warps=8, num_stages=3, descriptors=True),
    (100, 128): Tiles(keys=128, num_warps=8, num_stages=2, descriptors=True),
    (120, 32): Tiles(keys=64, num_warps=8, num_stages=3),
    (120, 64): Tiles(keys=64, num_warps=8, num_stages=3),
    (120, 96): Tiles(keys=16, num_warps=8, num_stages=4),
    (120, 128): Tiles(keys=32, num_warps=8, num_stages=3),
}


def architecture(capability: tuple[int, int] | None) -> int:
    """The entry of the table that stands for a compute capability; the most modest one for parts that are not NVIDIA's or unknown."""
    if capability is None:
        return 86
    major, minor = capability
    if major == 8:
        return 80 if minor == 0 else 86
    return {9: 90, 10: 100, 12: 120}.get(major, 86)


def tiles_for(capability: tuple[int, int] | None, head_dim: int) -> Tiles:
    """Tiles for a compute capability (None: not an NVIDIA part) and a head size up to 128."""
    arch = architecture(capability)
    rounded = next(size for size in (32, 64, 128) if head_dim <= size)
    return TABLE.get((arch, head_dim), TABLE[arch, rounded])
