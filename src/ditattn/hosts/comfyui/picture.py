"""How much of every layer and step was computed, as a picture."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ditattn.hosts.comfyui.handle import Handle

__all__ = ["density_picture"]

# from everything to nothing computed; a cell of which nothing is known
DENSE_COLOUR, SPARSE_COLOUR, UNKNOWN_COLOUR = (0.12, 0.16, 0.32), (0.98, 0.86, 0.45), (0.5, 0.5, 0.5)


def density_picture(handle: Handle, cell_pixels: int = 12) -> Tensor:
    """A row for each layer, a column for each step: from dark (dense) to light (little computed), grey where nothing ran.

    Returns:
        float32 `[1, height, width, 3]`, 0 to 1, as ComfyUI's images are; one grey cell if nothing ran. Several models share the columns and
        stand one below the other.
    """
    rows = []
    for model in handle.stage.models:
        densities = model.log.overall_densities()
        steps = max((step for step, _, _ in densities), default=-1) + 1
        layers = max((layer for _, layer, _ in densities), default=-1) + 1
        table = torch.full((layers, max(steps, model.log.schedule_steps or 0)), math.nan)
        for step, layer, density in densities:
            table[layer, step] = density
        rows.append(table)
    width = max((table.shape[1] for table in rows), default=1)
    padded = [torch.nn.functional.pad(table, (0, width - table.shape[1]), value=math.nan) for table in rows]
    table = torch.cat(padded) if padded and sum(map(len, padded)) else torch.full((1, 1), math.nan)
    dense, sparse, unknown = map(torch.tensor, (DENSE_COLOUR, SPARSE_COLOUR, UNKNOWN_COLOUR))
    share = table.clamp(0, 1).unsqueeze(-1)
    colours = torch.where(share.isnan(), unknown, share * dense + (1 - share) * sparse)
    return colours.repeat_interleave(cell_pixels, 0).repeat_interleave(cell_pixels, 1).unsqueeze(0)
