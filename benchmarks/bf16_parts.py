"""What attention on fp32 tensors loses when its products are formed from bf16 parts, as on a matrix unit that multiplies bf16 only.

    python -m benchmarks.bf16_parts            about two minutes on one thread
    python -m benchmarks.bf16_parts --length 300 --length 8192

Every operand is a sum of bf16 numbers, x = x0 + x1 (+ x2), each the rest of those before, rounded to nearest. A product of two operands is
the sum of the products of their parts whose numbers sum to less than the number of parts, added in fp32:

    bf16    x0 y0                                         1 product
    bf16x3  x0 y0 + x0 y1 + x1 y0                         3 products, of 2 parts
    bf16x6  bf16x3 + x0 y2 + x1 y1 + x2 y0                6 products, of 3 parts

Both products of attention are formed so, scores and output; the weights are split like the tensors. Softmax and sums are fp32. Nothing
here needs a CPU that multiplies bf16: products of bf16 numbers are exact in fp32. Errors are those of the Frobenius norm and of the worst
element, against float64, divided by torch's (`scaled_dot_product_attention` in fp32 on the same tensors).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

FORMS = {"bf16": (1, 1), "bf16x3": (2, 2), "bf16x6": (3, 3), "bf16x6, output bf16x3": (3, 2)}
"""Parts of the operands of the scores, and of the output."""

# query rows at once: the scores of one row are S numbers
ROWS = 512


@dataclass(frozen=True)
class Data:
    """Query, key and value `[S, D]` fp32."""

    query: Tensor
    key: Tensor
    value: Tensor


def kinds(length: int, head_dim: int) -> Iterator[tuple[str, Data]]:
    """The data of the ops' contract tests (tests/cases.py)."""
    generator = torch.Generator().manual_seed(length + head_dim)
    q, k, v = (torch.randn(length, head_dim, generator=generator, dtype=torch.float64) for _ in range(3))
    rising = torch.linspace(0.1, 10, length, dtype=torch.float64).unsqueeze(1)
    for name, tensors in (
        ("random", (q, k, v)),
        ("large logits", (10 * q, 10 * k, v)),
        ("shifted", (q, k + 3, v + 5)),
        ("rising norms", (q, k * rising, v)),
        ("negative logits", (q.abs() + 2, -4 * (k.abs() + 2), v)),
    ):
        yield name, Data(*(x.float() for x in tensors))


def parts_of(x: Tensor, number: int) -> list[Tensor]:
    """Summands of x, largest first, each a bf16 number in fp32."""
    parts = []
    for _ in range(number):
        parts.append(x.bfloat16().float())
        x = x - parts[-1]
    return parts


def product(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """The matrix product of two split operands, smallest summands first."""
    number = len(a)
    pairs = [(i, total - i) for total in reversed(range(number)) for i in range(total + 1)]
    first, *others = (a[i] @ b[j] for i, j in pairs)
    for other in others:
        first += other
    return first


def attention(data: Data, parts: tuple[int, int]) -> Tensor:
    scale = data.query.shape[1] ** -0.5 * math.log2(math.e)
    key, value = parts_of(data.key.T, parts[0]), parts_of(data.value, parts[1])
    out = []
    for query in data.query.split(ROWS):
        scores = product(parts_of(query, parts[0]), key)
        weights = ((scores - scores.amax(1, keepdim=True)) * scale).exp2()
        out.append(product(parts_of(weights, parts[1]), value) / weights.sum(1, keepdim=True))
    return torch.cat(out)


def exact(data: Data) -> Tensor:
    scale = data.query.shape[1] ** -0.5
    key, value = data.key.double().T, data.value.double()
    return torch.cat([(query.double() @ key * scale).softmax(1) @ value for query in data.query.split(ROWS)])


def errors(out: Tensor, right: Tensor) -> Tensor:
    """Relative in the norm; of the worst element, over the largest."""
    difference = out.double() - right
    return torch.stack([difference.norm() / right.norm(), difference.abs().max() / right.abs().max()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, action="append", help="tokens; may be repeated (300, 2048 and 8192)")
    parser.add_argument("--head-dim", type=int, action="append", help="may be repeated (64 and 128)")
    options = parser.parse_args()
    print(f"| S | D | data | torch fp32 | {' | '.join(FORMS)} |\n|{'---|' * (4 + len(FORMS))}")
    for length in options.length or (300, 2048, 8192):
        for head_dim in options.head_dim or (64, 128):
            for name, data in kinds(length, head_dim):
                right = exact(data)
                theirs = errors(scaled_dot_product_attention(*(x[None, None] for x in (data.query, data.key, data.value)))[0, 0], right)
                ratios = (errors(attention(data, parts), right) / theirs for parts in FORMS.values())
                cells = " | ".join(f"{norm:.3g} / {worst:.3g}" for norm, worst in ratios)
                print(f"| {length} | {head_dim} | {name} | {theirs[0]:.1e} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
