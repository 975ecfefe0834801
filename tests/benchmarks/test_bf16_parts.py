"""The measurement of what bf16 parts lose: its split, its products, and what it finds at a small size."""

from __future__ import annotations

import sys

import benchmarks.bf16_parts as bench
import pytest
import torch


def test_three_parts_are_the_number() -> None:
    x = torch.randn(1000) * torch.logspace(-20, 20, 1000)
    parts = bench.parts_of(x, 3)
    assert all(torch.equal(part, part.bfloat16().float()) for part in parts)
    assert torch.equal(parts[0] + parts[1] + parts[2], x)
    assert float(((x - parts[0] - parts[1]) / x).abs().max()) <= 2**-17


@pytest.mark.parametrize(("number", "products"), [(1, 1), (2, 3), (3, 6)])
def test_products_of_parts(number: int, products: int) -> None:
    """Parts that are powers of a base show which pairs are multiplied: each of those whose numbers sum to less than how many there are."""
    parts = [torch.full((1, 1), 10.0**-i) for i in range(number)]
    found = bench.product(parts, parts).item()
    assert sum(int(digit) for digit in f"{found:.6f}" if digit.isdigit()) == products
    assert found == pytest.approx(sum((i + 1) * 10.0**-i for i in range(number)))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_three_parts_keep_the_contract_and_two_do_not(head_dim: int) -> None:
    for name, data in bench.kinds(300, head_dim):
        right = bench.exact(data)
        theirs = bench.errors(torch.nn.functional.scaled_dot_product_attention(data.query, data.key, data.value), right)
        norm = {form: float((bench.errors(bench.attention(data, parts), right) / theirs)[0]) for form, parts in bench.FORMS.items()}
        assert norm["bf16x6"] < 1.5, name
        assert 1.5 < norm["bf16x3"] < 30, name
        assert norm["bf16"] > 300, name


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bf16_parts", "--length", "40", "--head-dim", "32"])
    bench.main()
    header, rule, *rows = capsys.readouterr().out.splitlines()
    assert header == "| S | D | data | torch fp32 | bf16 | bf16x3 | bf16x6 | bf16x6, output bf16x3 |"
    assert rule.count("---") == header.count(" |") == 8
    assert [row.split(" | ")[2] for row in rows] == ["random", "large logits", "shifted", "rising norms", "negative logits"]
