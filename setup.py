"""The one compiled part; all else is in pyproject.toml, where setuptools calls extension modules experimental."""

from setuptools import Extension, setup

# Loaded by ctypes, so it needs no headers of Python's. Optional: without a compiler numpy counts instead.
setup(
    ext_modules=[
        Extension(
            "trtforge.calibration._count",
            ["calibration/count.c"],
            extra_compile_args=["-O3"],
            py_limited_api=True,
            optional=True,
        )
    ]
)
