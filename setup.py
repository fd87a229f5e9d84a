"""The compiled part: passes over a tensor on the CPU, sn/kernels/native.c (else: pyproject.toml).

Optional: without a C compiler the package installs all the same, and is slower. It is C without
Python or torch, so it fits every version of both.
"""

import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("sn/kernels")
SOURCES = [KERNELS / "native.c", KERNELS / "native_passes.h"]
BASE = ["-O3", "-g0", "-std=gnu11", "-Wno-psabi", "-Wno-unknown-pragmas"]
WAYS = [  # compiler and linker flags, the best first: not every compiler has all of it
    ([*BASE, "-fopenmp"], ["-fopenmp"]),
    ([*BASE, "-fopenmp", "-DSN_NO_CLONES"], ["-fopenmp"]),
    ([*BASE, "-DSN_NO_CLONES"], []),
]


class BuildWithAnyCompiler(build_ext):
    def build_extension(self, extension):
        failure = None
        for extension.extra_compile_args, extension.extra_link_args in WAYS:
            try:
                return super().build_extension(extension)
            except Exception as error:
                failure = error
        raise failure  # the extension is optional: a warning

    def get_export_symbols(self, extension):
        return extension.export_symbols  # those of C, not the init function of a Python module


checksum = zlib.crc32(b"".join(source.read_bytes() for source in SOURCES))
setup(
    ext_modules=[
        Extension(
            "sn.kernels._native",
            [str(SOURCES[0])],
            depends=[str(SOURCES[1])],
            define_macros=[("SN_SOURCE", f"{checksum}u")],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildWithAnyCompiler},
)
