"""How often a process of the tests looks for garbage."""

from __future__ import annotations

import gc

# objects that are made before the newest are looked through, and such looks before older ones are
SELDOM = (20_000, 20, 50)


def collect_seldom() -> None:
    """Look through what is made from now on, and seldom.

    Imports leave half a million objects. Looking at them again and again would be a tenth of what tests that compile cost.
    """
    gc.freeze()
    gc.set_threshold(*SELDOM)
