"""The compiled parts; all else is in pyproject.toml, where setuptools calls extension modules experimental."""

from setuptools import Extension, setup


def _compiled(module: str, source: str) -> Extension:
    # Loaded by ctypes, so it needs no headers of Python's. Optional: Python does the same without a compiler.
    return Extension(f"trtforge.{module}", [source], extra_compile_args=["-O3"], py_limited_api=True, optional=True)


setup(
    ext_modules=[
        _compiled("calibration._count", "calibration/count.c"),
        _compiled("runtime._replay", "runtime/replay.c"),
    ]
)
