"""The compiled parts; all else is in pyproject.toml, where setuptools calls extension modules experimental."""

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel


def _compiled(module: str, source: str) -> Extension:
    # Loaded by ctypes, so it needs no headers of Python's. Optional: Python does the same without a compiler.
    return Extension(f"trtforge.{module}", [source], extra_compile_args=["-O3"], py_limited_api=True, optional=True)


class _AnyPython(bdist_wheel):
    """A wheel for every Python of a platform: what is compiled knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"bdist_wheel": _AnyPython},
    ext_modules=[
        _compiled("calibration._count", "calibration/count.c"),
        _compiled("runtime._replay", "runtime/replay.c"),
    ],
)
