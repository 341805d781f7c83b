"""The optional part of the build: the C++ kernels of this kind of machine, one library per level.

Without a compiler, or where it refuses, the package is built all the same; it then compiles at
first use, or runs on torch (kernels/native.py). Everything else is in pyproject.toml.
"""

import importlib.util
import logging
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

# the package cannot be imported here: it needs torch
_PATH = Path(__file__).parent / "kernels" / "native_build.py"
_SPEC = importlib.util.spec_from_file_location("native_build", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
log = logging.getLogger("everstep.setup")
native_build = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(native_build)


class BuildWithKernels(build_py):
    """Adds kernels/cpu/lib/*.so to what is packed; never fails for want of them."""

    def run(self) -> None:
        super().run()
        # an editable install runs from the checkout, whose sources change: compiled at first use
        if not self.editable_mode:
            build_libraries(Path(self.build_lib) / "everstep" / "kernels" / "cpu" / "lib")


def build_libraries(folder: Path) -> None:
    """Every level that the compiler knows, best first."""
    compiler = native_build.find_compiler()
    if compiler is None:
        log.warning("kernels: no C++ compiler; the package compiles at first use")
        return
    for level in native_build.levels_of_this_kind():
        try:
            native_build.build(level, folder / native_build.library_name(level), compiler)
        except (native_build.BuildError, OSError) as error:
            log.warning("kernels: level %s is not built: %s", level, error)


class WheelOfThisKind(bdist_wheel):
    """A wheel with libraries fits this kind of machine, and every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class DistributionWithLibraries(Distribution):
    def has_ext_modules(self) -> bool:
        return native_build.find_compiler() is not None


setup(
    distclass=DistributionWithLibraries,
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelOfThisKind},
)
