"""What each of several ranks saw of one run, put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from ditattn.runtime.probe import CellReading

__all__ = ["mean_densities", "merged_orders", "merged_readings"]

Densities = dict[str, list[tuple[int, int, float]]]
HeadOrders = dict[str, dict[int, list[str]]]


def mean_densities(ranks: Sequence[Densities]) -> Densities:
    """Of every component, step and layer, over ranks that ran the same calls."""
    return {
        name: [
            (step, layer, fmean(density for _, _, density in cells))
            for cells in zip(*(densities[name] for densities in ranks), strict=True)
            for step, layer, _ in cells[:1]
        ]
        for name in ranks[0]
    }


def merged_orders(ranks: Sequence[HeadOrders], ulysses: int) -> HeadOrders:
    """Orders of all heads: `ulysses` neighbouring ranks share the heads; of groups that each have all, the most common, the first first."""
    groups = [ranks[start : start + ulysses] for start in range(0, len(ranks), ulysses)]

    def of_layer(name: str, layer: int) -> list[str]:
        by_group = [[order for rank in group for order in rank[name][layer]] for group in groups]
        return [Counter(head).most_common(1)[0][0] for head in zip(*by_group, strict=True)]

    return {name: {layer: of_layer(name, layer) for layer in layers} for name, layers in ranks[0].items()}


def merged_readings(ranks: Sequence[Sequence[CellReading]]) -> list[CellReading]:
    """Means over ranks that tried the same calls; the time is that of the slowest, for which the others wait."""
    return [_merged_cell(cells) for cells in zip(*ranks, strict=True)]


def _merged_cell(cells: Sequence[CellReading]) -> CellReading:
    return replace(
        cells[0],
        error=fmean(cell.error for cell in cells),
        dropped_mass=fmean(cell.dropped_mass for cell in cells),
        density=fmean(cell.density for cell in cells),
        sparse_ms=max(cell.sparse_ms for cell in cells),
        dense_ms=max(cell.dense_ms for cell in cells),
    )
