"""Builds the one native extension; everything else is in pyproject.toml.

WDMOE_DEBUG=1 builds it with bounds checks, assertions and no optimisation. WDMOE_SANITIZE=1 builds it with the
sanitizers of addresses and undefined behaviour, for `tools/sanitize`.
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

debug = os.environ.get("WDMOE_DEBUG") == "1"
# No -ffast-math: it breaks the NaN checks. No -march=native: wheels travel. No contraction to fused
# multiply-add, which some boards have and others lack: every machine gets the same digits.
# No debug information, which Python's own flags ask for: it takes a sixth of the time and most of the file.
flags = ["-O0", "-g", "-D_GLIBCXX_ASSERTIONS"] if debug else ["-O3", "-g0"]
link_flags = []
if os.environ.get("WDMOE_SANITIZE") == "1":
    checks = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    flags = [*checks, "-O1", "-g", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]
    link_flags = checks
flags += ["-std=c++20", "-ffp-contract=off", "-Wall", "-Wextra"]

HEADERS = (
    "bandwidth",
    "bandwidth_blocks",
    "bandwidth_decided",
    "bandwidth_quick",
    "bottleneck",
    "budget",
    "by_device",
    "checks",
    "combine",
    "copies",
    "grouping",
    "hertz",
    "link_time",
    "norms",
    "replacing",
    "row_top_k",
    "selection",
)


class BuildExtension(build_ext):
    """Says what is missing when the extension cannot be built. There is no slow fallback to hide it."""

    def build_extension(self, ext):
        """As the base class, with a message for people."""
        try:
            super().build_extension(ext)
        except (CompileError, LinkError, PlatformError) as error:
            raise SystemExit(
                f"wdmoe: cannot build {ext.name}: {error}\n"
                "wdmoe needs a C++20 compiler (g++ >= 10 or clang >= 13) and Python's headers; "
                "on Debian, Ubuntu or JetPack: apt-get install g++ python3-dev"
            ) from error


setup(
    cmdclass={"build_ext": BuildExtension},
    ext_modules=cythonize(
        [
            Extension(
                "wdmoe.solver._native",
                sources=["wdmoe/solver/_native.pyx"],
                depends=[f"native/wdmoe/{name}.hpp" for name in HEADERS],
                include_dirs=["native"],
                extra_compile_args=flags,
                extra_link_args=link_flags,
                language="c++",
            )
        ],
        compiler_directives={"language_level": 3, "boundscheck": debug, "wraparound": False},
    ),
)
