"""Builds the one native extension; everything else is in pyproject.toml.

WDMOE_DEBUG=1 builds it with bounds checks, assertions and no optimisation.
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

debug = os.environ.get("WDMOE_DEBUG") == "1"
# No -ffast-math: it breaks the NaN checks. No -march=native: wheels travel.
flags = ["-O0", "-g", "-D_GLIBCXX_ASSERTIONS"] if debug else ["-O3"]

setup(
    ext_modules=cythonize(
        [
            Extension(
                "wdmoe.solver._native",
                sources=["wdmoe/solver/_native.pyx"],
                include_dirs=["native"],
                extra_compile_args=["-std=c++20", "-Wall", "-Wextra", *flags],
                language="c++",
            )
        ],
        compiler_directives={"language_level": 3, "boundscheck": debug, "wraparound": False},
    )
)
