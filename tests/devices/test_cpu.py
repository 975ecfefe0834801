"""What is known about a CPU, and the warning about dtypes that it multiplies slowly."""

from __future__ import annotations

import pytest
import torch

from ditattn.devices import cpu


def test_a_dtype_that_is_multiplied_slowly_is_named_with_both_rates() -> None:
    rates = {torch.float32: 113.0, torch.bfloat16: 1.2}
    assert cpu.slow_dtype(torch.bfloat16, rates.__getitem__) == (
        "torch multiplies bfloat16 matrices 94 times slower than float32 on this CPU (1.2 against 113 GFLOP/s): it has no instructions "
        "for bfloat16, so float32 will be much faster"
    )


@pytest.mark.parametrize("half", [12.0, 113.0, 900.0])
def test_a_dtype_that_is_multiplied_well_enough_is_not(half: float) -> None:
    assert cpu.slow_dtype(torch.float16, {torch.float32: 113.0, torch.float16: half}.__getitem__) is None


def test_single_precision_is_never_slower_than_itself() -> None:
    assert cpu.slow_dtype(torch.float32, lambda dtype: 1.0) is None


def test_rates_are_measured() -> None:
    assert cpu._product_rate(torch.float32) > 0


def test_fields_of_the_first_processor() -> None:
    found = cpu.cpuinfo()
    assert all(name and name == name.strip() for name in found)
