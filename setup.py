"""The compiled part: passes over a tensor on the CPU, sn/kernels/native.c (else: pyproject.toml).

Optional: without a C compiler the package installs all the same, and the layer is the plain
formula, which is slower. It is C without Python or torch, so it fits every version of both. Where
torch can be imported during the build (`pip install --no-build-isolation`, as `make install` does)
autograd.cpp is built too, for that version of it: with it small maps take less time.
"""

import re
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("sn/kernels")
SOURCES = sorted(path for path in KERNELS.iterdir() if path.suffix in (".c", ".cpp", ".h"))
BASE = ["-O3", "-g0", "-std=gnu11", "-Wno-psabi", "-Wno-unknown-pragmas"]
WAYS = {  # compiler and linker flags, the best first: not every compiler has all of it
    ".c": [
        ([*BASE, "-fopenmp"], ["-fopenmp"]),
        ([*BASE, "-fopenmp", "-DSN_NO_CLONES"], ["-fopenmp"]),
        ([*BASE, "-DSN_NO_CLONES"], []),
    ],
    ".cpp": [(["-O2", "-g0", f"-std=c++{year}"], []) for year in (20, 17)],
}
CHECKSUM = zlib.crc32(b"".join(source.read_bytes() for source in SOURCES))


class BuildWithAnyCompiler(build_ext):
    def build_extension(self, extension):
        failure = None
        ways = WAYS[Path(extension.sources[0]).suffix]
        for extension.extra_compile_args, extension.extra_link_args in ways:
            try:
                return super().build_extension(extension)
            except Exception as error:
                failure = error
        raise failure  # the extension is optional: a warning

    def get_export_symbols(self, extension):
        return extension.export_symbols  # those of C, not the init function of a Python module


def extension(name: str, source: str, **options) -> Extension:
    return Extension(
        f"sn.kernels.{name}",
        [str(KERNELS / source)],
        depends=[str(source) for source in SOURCES],
        define_macros=[("SN_SOURCE", f"{CHECKSUM}u"), ("SN_MODULE", name)],
        optional=True,
        **options,
    )


extensions = [extension("_native", "native.c")]
try:
    import torch
except Exception:  # not there, or not whole
    pass
else:
    home = Path(torch.__file__).parent
    extensions.append(
        extension(
            "_autograd_" + re.sub(r"\W", "_", torch.__version__),
            "autograd.cpp",
            include_dirs=[str(home / "include"), str(home / "include/torch/csrc/api/include")],
            library_dirs=[str(home / "lib")],
            libraries=["torch_python", "torch_cpu", "c10"],
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": BuildWithAnyCompiler})
