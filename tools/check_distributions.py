"""What must be true of the files in `dist/` before an upload: one sdist, and wheels with every kernel and a tag that indexes accept.

Exit status 1 and one line per problem. `--tag v0.1.0` also compares their version with a release's tag.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

NATIVE = "ditattn/ops/native"


def wheel_problems(wheel: Path) -> Iterator[str]:
    """A wheel that lacks a kernel would make its users slow in silence, so it is refused here, unlike an install on their own machine."""
    platforms = wheel.stem.split("-")[-1].split(".")
    if not all(platform.startswith("manylinux_") for platform in platforms):
        yield f"the platform tag is {'.'.join(platforms)}, wanted manylinux_*: package indexes refuse others; `auditwheel repair` sets it"
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        if f"{NATIVE}/build.json" not in names:
            yield f"{NATIVE}/build.json is missing: the build did not say which kernels it made"
            return
        report = json.loads(archive.read(f"{NATIVE}/build.json"))
    for variant, reason in report["failed"].items():
        yield f"the {variant} kernels were not built: {reason}"
    for variant in report["built"]:
        if f"{NATIVE}/libditattn_cpu_{variant}.so" not in names:
            yield f"build.json says that the {variant} kernels were built, but their object is missing"


def problems(folder: Path, tag: str | None) -> Iterator[str]:
    """Every problem of the distributions in `folder`, each with the name of its file."""
    sdists, wheels = sorted(folder.glob("*.tar.gz")), sorted(folder.glob("*.whl"))
    if len(sdists) != 1 or not wheels:
        yield f"{folder}: found {len(sdists)} sdists and {len(wheels)} wheels, wanted one sdist and at least one wheel: make wheel"
    versions = {path: path.name.removesuffix(".tar.gz").split("-")[1] for path in [*sdists, *wheels]}
    for path, version in versions.items():
        wanted = tag.removeprefix("v") if tag else next(iter(versions.values()))
        if version != wanted:
            yield f"{path.name}: version {version}, wanted {wanted}"
    for wheel in wheels:
        yield from (f"{wheel.name}: {problem}" for problem in wheel_problems(wheel))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tag", help="the release's tag, such as v0.1.0")
    arguments = parser.parse_args()
    found = list(problems(arguments.folder, arguments.tag))
    print("\n".join(found) or f"{arguments.folder}: ready to upload")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
