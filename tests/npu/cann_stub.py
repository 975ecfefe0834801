"""Stand-ins for CANN's runtime libraries, so that the real torch_npu and mindiesd packages load on a machine without an NPU.

Every C function that the packages want from CANN becomes one that returns 0; a few return something plausible: one device, its name
(CANN_STUB_SOC), 8 GiB, CANN 9.0.0. Nothing is computed. Made with the C compiler while the tests run, kept nowhere.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

# what the packages are linked against; all functions live in the first one
LIBRARIES = (
    "libascendcl.so",
    "libhccl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
    "libnnopbase.so",
    "libopapi.so",
)
SOC_VARIABLE = "CANN_STUB_SOC"
CANN = re.compile(r"acl|Hccl|Mspr|rt[A-Z]")
# torch_npu looks these up by name instead of linking them
BY_NAME = re.compile(rb"(?<![\w])(?:acl(?:rt|Get|Set|Init|Finalize|prof|op|sys|mdl|Dump)|Hccl)\w{3,60}(?=\0)")
BODIES = {
    "aclrtGetDeviceCount": "int f(uint32_t *n) { *n = 1; return 0; }",
    "aclrtGetDevice": "int f(int32_t *d) { *d = 0; return 0; }",
    "aclrtGetSocName": f'const char *f(void) {{ const char *s = getenv("{SOC_VARIABLE}"); return s ? s : "Ascend910B2"; }}',
    "aclGetRecentErrMsg": 'const char *f(void) { return ""; }',
    "aclrtGetMemInfo": "int f(int a, size_t *n, size_t *t) { *n = *t = (size_t)8 << 30; return 0; }",
    "aclrtGetCurrentContext": "int f(void **c) { *c = (void *)0x2000; return 0; }",
    "aclrtGetPrimaryCtxState": "int f(int d, uint32_t *n, int32_t *a) { *a = 1; return 0; }",
    "aclrtCreateStreamWithConfig": "int f(void **s, uint32_t p, uint32_t n) { *s = (void *)0x1000; return 0; }",
    "aclrtMalloc": "int f(void **p, size_t s, int n) { *p = aligned_alloc(512, (s + 511) / 512 * 512); return 0; }",
    "aclGetCompileoptSize": "size_t f(int n) { return 64; }",
    "aclrtFree": "int f(void *p) { free(p); return 0; }",
    "aclsysGetCANNVersion": 'int f(int n, char *v) { memset(v, 0, 256); strcpy(v, "9.0.0"); return 0; }',
}


def build(folder: Path) -> None:
    """Compile the stand-ins into `folder`."""
    code = ["#include <stdint.h>", "#include <stdlib.h>", "#include <string.h>"]
    code += [BODIES.get(name, "long f(void) { return 0; }").replace("f(", f"{name}(", 1) for name in sorted(_names())]
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "the stand-ins for CANN need a C compiler"
    for library in LIBRARIES:
        first = library == LIBRARIES[0]
        # torch_npu looks for functions in the library that really has them: through the others the first one must be found
        needs = [] if first else ["-Wl,--no-as-needed", f"-L{folder}", "-lascendcl"]
        command = [compiler, "-w", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(folder / library), "-x", "c", "-", *needs]
        subprocess.run(command, input="\n".join(code) if first else "", text=True, check=True)


def preload(folder: Path) -> None:
    """Load them into this process: libraries that ask for one of these names then get ours."""
    for library in LIBRARIES:
        ctypes.CDLL(str(folder / library), mode=os.RTLD_GLOBAL | os.RTLD_NOW)


def _names() -> set[str]:
    names: set[str] = set()
    for library in _linked():
        listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
        names |= {word for word in (line.split()[-1].split("@")[0] for line in listed.splitlines()) if CANN.match(word)}
        names |= {match.decode() for match in BY_NAME.findall(library.read_bytes())}
    return {name for name in names if name.isidentifier()}


def _linked() -> list[Path]:
    """Shared objects of the packages that are linked against CANN."""
    torch_npu = _folder("torch_npu")
    assert torch_npu is not None
    found = [torch_npu / "lib" / "libtorch_npu.so", torch_npu / "lib" / "libtensorpipe.so", *torch_npu.glob("_C*.so")]
    mindiesd = _folder("mindiesd")
    variant = "torch" + "".join(importlib.metadata.version("torch").split(".")[:2])
    return found + (list((mindiesd / "plugin" / variant).glob("*.so")) if mindiesd else [])


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None
