"""The CPU kernels' sources in a program of their own: under sanitizers, with other compilers, for Arm."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from cpu_builds import CSRC, EMULATED, FLAGS, ROOT, build, runs_here

PROGRAM = ROOT / "tests/ops/sanitize_cpu.cpp"


def with_two_head_sizes(csrc: Path) -> Path:
    """A copy of the sources without kernels for head sizes 64 and 96, which takes half as long to compile."""
    shutil.copytree(CSRC, csrc)
    library = csrc / "library.cpp"
    kept, left_out = re.subn(r"    case (64|96): .*\n", "", library.read_text())
    assert left_out == 2
    library.write_text(kept)
    return csrc


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
@pytest.mark.parametrize("variant", FLAGS)
def test_sanitizers(variant: str, sanitizer: str, tmp_path: Path) -> None:
    """Exact-size buffers, dense and sparse: no access outside at any tail, no data race between threads."""
    if not runs_here(variant):
        pytest.skip(f"this CPU cannot run {variant}")
    csrc = with_two_head_sizes(tmp_path / "csrc") if sanitizer == "thread" else CSRC
    target = build(tmp_path / "sanitize", "g++", PROGRAM, "-O1", "-g1", f"-fsanitize={sanitizer}", *FLAGS[variant], csrc=csrc)
    done = subprocess.run([str(target)], capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-500:]


@pytest.mark.long
@pytest.mark.parametrize(
    ("compiler", "variant", "emulator"),
    [
        ("g++", "baseline", None),
        ("clang++", "baseline", None),
        ("clang++", "amx", None),
        ("clang++", EMULATED, None),
        ("g++", EMULATED, None),
        ("aarch64-linux-gnu-g++", "arm", "qemu-aarch64-static"),
    ],
)
def test_other_compilers_and_arm(compiler: str, variant: str, emulator: str | None, tmp_path: Path) -> None:
    """The same program against sums in double, as far as the compilers (and for Arm an emulator) are installed."""
    missing = [tool for tool in (compiler, emulator) if tool is not None and shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if emulator is None and not runs_here(variant):
        pytest.skip(f"this CPU cannot run {variant}")
    target = build(tmp_path / "compare", compiler, PROGRAM, "-O2", "-static", *FLAGS.get(variant, []))
    done = subprocess.run([*([emulator] if emulator else []), str(target), "compare"], capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    assert int(done.stdout.split()[2]) > 1000


needs_emulation = pytest.mark.skipif(
    shutil.which("g++") is None or not runs_here(EMULATED), reason="emulated tiles need g++ and a CPU with AVX512_BF16"
)


@needs_emulation
def test_the_amx_kernels_with_emulated_tiles(tmp_path: Path) -> None:
    """Against sums in double, at a few lengths; a call leaves the tile configuration that it found."""
    target = build(tmp_path / "compare", "g++", PROGRAM, "-O1", *FLAGS[EMULATED], csrc=with_two_head_sizes(tmp_path / "csrc"))
    done = subprocess.run([str(target), "compare", "few"], capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    assert int(done.stdout.split()[2]) > 100


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("emulation") / "tiles", "g++", ROOT / "tests/ops/emulated_tiles.cpp", "-O1", *FLAGS[EMULATED])


@needs_emulation
def test_emulated_products_are_those_of_the_manual(emulation: Path) -> None:
    """Bit by bit, on numbers of every size and tiles of several shapes."""
    done = subprocess.run([str(emulation), "products"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 elements differ\n", "")


MISTAKES = (
    "tdpbf16ps: no tile configuration is loaded",
    "tileloadd: no tile configuration is loaded",
    "tilestored: no tile configuration is loaded",
    "tilezero: no tile configuration is loaded",
    "tilezero: no tile configuration is loaded",
    "ldtilecfg: a tile has at most 16 rows of 64 bytes",
    "ldtilecfg: a tile has at most 16 rows of 64 bytes",
    "ldtilecfg: a tile with rows needs columns",
    "ldtilecfg: the palette must be 0 or 1",
    "ldtilecfg: there are eight tiles",
    "tileloadd: the configuration does not have this tile",
    "tdpbf16ps: the three tiles must be different ones",
    "tdpbf16ps: rows of A and columns of B must be those of C",
    "tdpbf16ps: A must have as many pairs in a row as B has rows",
    "tdpbf16ps: rows must be whole pairs",
    "end of a thread: a tile configuration is still loaded",
)


@needs_emulation
@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_the_emulation_ends_the_program_at_a_mistake(number: int, emulation: Path) -> None:
    done = subprocess.run([str(emulation), str(number)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    assert f"emulated tiles: {MISTAKES[number]}" in done.stderr


MUTATIONS = {
    "no configuration": ("    load_config(TileConfig::full());\n", "", "no tile configuration is loaded"),
    "nothing left as it was": ("else release_tiles();", "else (void)0;", "still loaded|another tile configuration"),
    "another's configuration lost": ("if (found.palette) load_config(found);\n      else ", "", "another tile configuration"),
    "a product of other tiles": ("tile_product<2, 5, 6>();", "tile_product<2, 5, 7>();", "error"),
    "a pair of two parts left out": ("A[COUNT] = {1, 0, 0}", "A[COUNT] = {0, 0, 1}", "parts 2 .* error"),
    "a pair of three parts left out": ("A[COUNT] = {2, 1, 1,", "A[COUNT] = {2, 1, 2,", "parts 3 .* error"),
    "output before its weights": ("LAG = PIECES + 1", "LAG = PIECES", "overlapped 1 .* error"),
    "output left as it was": (
        "        Base::rescale(panel(job).O, alpha);\n        follow(job, alpha);",
        "        follow(job, alpha);",
        "overlapped 1 .* error",
    ),
    "weights beyond fp32": ("AGAIN = 24", "AGAIN = 1e30f", "overlapped 1 .* error"),
    "sums of weights that are formed again": ("std::copy_n(rows(job).sum_before, PQ, softmax.sum);", "", "overlapped 1 .* error"),
    "blocks not added up": ("_mm512_fmadd_ps(_mm512_load_ps(o), factor, ", "(", "parts [23] .* error"),
}


@needs_emulation
@pytest.mark.long
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mistakes_in_the_amx_kernels_are_seen(mutation: str, tmp_path: Path) -> None:
    right, wrong, said = MUTATIONS[mutation]
    csrc = with_two_head_sizes(tmp_path / "csrc")
    sources = [csrc / "amx.h", csrc / "amx_overlapped.h"]
    (mutated,) = [path for path in sources if right in path.read_text()]
    assert mutated.read_text().count(right) == 1
    mutated.write_text(mutated.read_text().replace(right, wrong))
    target = build(tmp_path / "compare", "g++", PROGRAM, "-O1", *FLAGS[EMULATED], csrc=csrc)
    done = subprocess.run([str(target), "compare", "few"], capture_output=True, text=True, timeout=570)
    assert done.returncode != 0
    assert re.search(said, done.stderr + done.stdout)
