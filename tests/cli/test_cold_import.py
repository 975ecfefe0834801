"""A fresh interpreter: importing does nothing, and help needs no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

HEAVY = ("diffusers", "transformers", "triton", "torch_npu", "typer", "rich")


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)


def loaded(code: str) -> set[str]:
    """Top-level modules that `code` leaves behind; it must print nothing."""
    done = fresh(
        f"{textwrap.dedent(code)}\nimport json, sys\nsys.stderr.write(json.dumps(sorted({{n.split('.')[0] for n in sys.modules}})))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("["), done.stderr
    return set(json.loads(done.stderr))


def test_importing_the_package_loads_nothing():
    modules = loaded("import ditattn")
    assert modules.isdisjoint((*HEAVY, "torch", "pydantic", "yaml"))


def test_the_interface_needs_torch_and_nothing_optional():
    modules = loaded("import ditattn; ditattn.AttentionBackendEnum; ditattn.get_attn_backend; ditattn.BlockPlan; ditattn.dense_attention")
    assert "torch" in modules
    # triton comes with torch's own import where it is installed: compare with torch alone
    assert modules & set(HEAVY) <= loaded("import torch")


def test_every_public_name_is_there_and_no_other_is_listed():
    import ditattn

    assert sorted(set(ditattn._WHERE) | {"__version__"}) == ditattn.__dir__() == sorted(set(ditattn.__all__))
    for name in ditattn.__all__:
        assert getattr(ditattn, name) is not None


def test_importing_ours_costs_little_beside_torch():
    done = fresh(
        """
        import time
        start = time.perf_counter(); import torch; torch_s = time.perf_counter() - start
        start = time.process_time()
        import ditattn; ditattn.AttentionBackendEnum; ditattn.get_attn_backend; ditattn.dense_attention; ditattn.block_sparse_attention
        print(time.process_time() - start)
        """
    )
    # processor time, so that a busy machine does not matter
    assert float(done.stdout) < 0.5, done.stderr


HELP = (
    ["--help"],
    ["--version"],
    *([verb, "--help"] for verb in ("generate", "compare", "tune", "backends", "models", "bench")),
    [],
)


def test_help_needs_no_torch():
    """In one process: what one of them had imported would be there after the last."""
    done = fresh(
        f"""
        import io, json, sys
        from contextlib import redirect_stdout
        from ditattn.cli import main
        seen = []
        for arguments in {HELP!r}:
            with redirect_stdout(io.StringIO()) as out:
                try:
                    main(arguments)
                except SystemExit as error:
                    status = error.code
            heavy = {{"torch", "diffusers", "transformers", "numpy"}} & set(sys.modules)
            seen.append([status, sorted(heavy), "ditattn" in out.getvalue()])
        print(json.dumps(seen))
        """
    )
    assert (done.returncode, done.stderr) == (0, "")
    seen = {" ".join(arguments): found for arguments, found in zip(HELP, json.loads(done.stdout), strict=True)}
    assert seen == {" ".join(arguments): [0 if arguments else 2, [], True] for arguments in HELP}


def test_python_m():
    done = subprocess.run([sys.executable, "-m", "ditattn", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ditattn 0.")


def help_of(verb, **environment):
    command = [sys.executable, "-m", "ditattn", verb, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "200", **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_names_the_backends_of_other_packages_without_importing_them(tmp_path):
    folder = tmp_path / "nearest-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: nearest\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[ditattn.backends]\nnearest_attn = nowhere:NearestAttentionBackend\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    for verb in ("generate", "compare"):
        assert "permuted_sparse_attn, nearest_attn" in help_of(verb, PYTHONPATH=path)
        assert "nearest_attn" not in help_of(verb)


def test_without_typer_the_command_says_what_to_install():
    done = fresh("import sys; sys.modules['typer'] = None; from ditattn.cli import main; main(['--help'])")
    assert done.returncode == 1
    assert done.stderr == "ditattn: error: package 'typer' is missing (the command line): pip install ditattn\n"
