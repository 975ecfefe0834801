"""What torchao makes of some numbers, recorded: run with torchao 0.18.0 installed, this writes the file again.

python tests/ops/mx_linear/recorded.py
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import torch
from torch import Tensor

FILE = Path(__file__).with_name("torchao_0_18_0.json")
# torchao divides by 2^-126 where the scale is 2^-127, so its values of these blocks are half of what the scale says
SMALLEST_LARGEST = 2.0**-124


def inputs() -> Tensor:
    """float32 `[blocks, 32]`: any bits, normal values of all sizes, every tie and its neighbours, and special numbers."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (60, 32), generator=generator, dtype=torch.int64).to(torch.int32).view(torch.float32)
    bits = torch.where(bits.isfinite(), bits, torch.ones(()))
    normal = torch.randn(60, 32, generator=generator) * torch.exp2(torch.linspace(-140, 120, 60).round()).unsqueeze(1)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    ties = torch.cat([ties, ties.nextafter(torch.zeros(())), ties.nextafter(torch.tensor(9.0))])
    # 24 of them, and negative ones; the largest, 7, makes the scale 1
    ties = torch.cat([ties, -ties[:8]])
    ties = torch.stack([ties * 2.0**exponent for exponent in (-118, -1, 0, 1, 100, 125)])
    special = torch.zeros(6, 32)
    special[1, 3] = -0.0
    special[2, :2] = torch.tensor([torch.inf, 1.0])
    special[3, :2] = torch.tensor([-torch.inf, 3e38])
    special[4, 5] = torch.finfo(torch.float32).max
    special[5, :2] = torch.tensor([torch.nan, 1.0])
    return torch.cat([bits, normal, ties, special])


def torchao_result(x: Tensor) -> tuple[Tensor, Tensor]:
    """Packed bytes `[blocks, 16]` and exponents `[blocks]`."""
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

    scale, packed = to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.FLOOR)
    return packed, scale.view(torch.uint8).flatten()


def text_of(x: Tensor) -> str:
    return base64.b64encode(x.contiguous().view(torch.uint8).numpy().tobytes()).decode()


def tensor_of(text: str, dtype: torch.dtype, columns: int) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype).view(-1, columns)


if __name__ == "__main__":
    import torchao

    x = inputs()
    packed, scale = torchao_result(x)
    record = {
        "source": f"torchao {torchao.__version__}, torchao.prototype.mx_formats.mx_tensor.to_mx, float4_e2m1fn_x2, block 32, FLOOR",
        "float32": text_of(x),
        "packed": text_of(packed),
        "scale": text_of(scale),
    }
    FILE.write_text(json.dumps(record, indent=1) + "\n")
