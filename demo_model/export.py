"""Write the folder that ships: the averaged weights of a training run, transformer in bf16.

python -m demo_model.export --run DIR --out src/ditattn/demo_weights
"""

import argparse
import shutil
from pathlib import Path

import torch

from demo_model.build import save_pipeline
from demo_model.sample import load

LARGEST_BYTES = 20_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder that demo_model.train wrote")
    parser.add_argument("--out", type=Path, required=True, help="replaced if it exists")
    args = parser.parse_args()
    pipe = load(args.run / "pipeline", torch.bfloat16)
    shutil.rmtree(args.out, ignore_errors=True)
    save_pipeline(pipe, args.out)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    if size > LARGEST_BYTES:
        raise SystemExit(f"{args.out} holds {size / 1e6:.1f} MB, more than {LARGEST_BYTES / 1e6:.0f} MB may ship")
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
