"""The orders of tokens that heads choose, so that later runs need not choose: PAROAttention (arXiv 2506.16054) reports that an order found
once for a head serves every step and prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ditattn.backends.registry import load_backend
from ditattn.backends.setting import Setting
from ditattn.compare.setting import Clip
from ditattn.compare.workload import Workload

__all__ = ["most_chosen_orders", "setting_chooses_orders"]

KEY = "head_bricks"


def setting_chooses_orders(setting: Setting) -> bool:
    """True if heads choose an order under this setting, and nobody has chosen for them."""
    if setting.backend is None or KEY not in load_backend(setting.backend).get_config_cls().model_fields:
        return False
    return KEY not in setting.keys and "bricks" not in setting.keys


def most_chosen_orders(workload: Workload, setting: Setting, clips: Sequence[Clip]) -> list[str]:
    """`head_bricks` for the backend: for every layer what each key head chose on most of the clips, the first one among equals.

    Empty where several denoisers share the setting, since the key knows layers only: then heads go on choosing.
    """
    votes: dict[int, list[Counter[str]]] = {}
    for clip in clips:
        by_component = workload.render(setting, clip).head_orders
        if len(by_component) != 1:
            return []
        for layer, orders in next(iter(by_component.values())).items():
            heads = votes.setdefault(layer, [Counter() for _ in orders])
            for head, order in zip(heads, orders, strict=True):
                # a further grid of the sequence follows the target's shape
                head[order.partition(" + ")[0]] += 1
    names = {layer: [head.most_common(1)[0][0] for head in heads] for layer, heads in votes.items()}
    return [",".join(names.get(layer, [])) for layer in range(max(names, default=-1) + 1)]
