"""Where the packages lie, and the compiled libraries; everything else about the build is in pyproject.toml.

Without a compiler, ninja or PyTorch the package installs all the same and runs its reference backend; code that a
compiler refuses is an error.

* SHIFCON_NATIVE=0 leaves the libraries out; SHIFCON_NATIVE=1 makes it an error if they cannot be compiled.
* SHIFCON_CUDA=1 compiles the CUDA library where nvcc is (no GPU is needed), or is an error; 0 leaves it out. Unset,
  it is compiled where nvcc is and PyTorch was built for CUDA.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
import ninja_build
from ninja_build import BuildError

PACKAGE = "shifcon_fast._native"


def asked(variable: str) -> bool | None:
    """What the environment says: True for 1, False for 0, None where it says nothing."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise BuildError(f"{variable}: got {value!r}; wanted 0 or 1")
    return value == "1" if value else None


def libraries() -> tuple[list[str], list[str]]:
    """Which libraries are compiled here, and a sentence for each that could be expected and is not.

    Raises:
        BuildError: one that was asked for cannot be compiled.
    """
    native, cuda = asked("SHIFCON_NATIVE"), asked("SHIFCON_CUDA")
    if native is False:
        if cuda:
            raise BuildError("SHIFCON_CUDA=1 asks for a compiled library, SHIFCON_NATIVE=0 for none")
        return [], []
    try:
        toolchain = ninja_build.find_toolchain()
    except BuildError as error:
        if native or cuda:
            raise
        slower = "The operators will run in plain PyTorch, slower. SHIFCON_NATIVE=1 makes this an error"
        return [], [f"building shifcon_fast without the compiled extension: {error}. {slower}"]
    if cuda is False:
        return ["cpu"], []
    problem = ninja_build.cuda_problem(toolchain)
    if cuda:
        if problem is not None:
            raise BuildError(f"SHIFCON_CUDA=1, but {problem}")
        return ["cpu", "cuda"], []
    if toolchain.torch_cuda is None:
        return ["cpu"], []
    # A runtime newer than PyTorch's wants a newer driver than PyTorch does.
    if problem is None and ninja_build.nvcc_release(str(toolchain.nvcc))[0] > toolchain.torch_cuda[0]:
        problem = f"nvcc is newer than the CUDA {toolchain.torch_cuda[0]} that PyTorch was built for"
    if problem is not None:
        without = "building shifcon_fast without its CUDA library"
        return ["cpu"], [
            f"{without}: {problem}. SHIFCON_CUDA=1 makes this an error, SHIFCON_CUDA=0 leaves it out"
        ]
    return ["cpu", "cuda"], []


class BuildPython(build_py):
    """Say once, where the package is put together, what it will lack."""

    def run(self) -> None:
        for sentence in lacking:
            print(f"warning: {sentence}", file=sys.stderr)
        super().run()


class BuildNative(build_ext):
    """Compile each library with ninja, to where setuptools expects it."""

    def run(self) -> None:
        # What an earlier build left in this folder would be packed into the wheel as well.
        wanted = {Path(self.get_ext_fullpath(ext.name)).name for ext in self.extensions}
        for old in Path(self.build_lib, *PACKAGE.split(".")).glob("*.so"):
            if old.name not in wanted:
                old.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        name = ext.name.removeprefix(f"{PACKAGE}.")
        build = ninja_build.build_cuda if name == "cuda" else ninja_build.build_cpu
        try:
            build(ninja_build.find_toolchain(), library, Path(self.build_temp).resolve() / name, verbose=True)
        except BuildError as error:
            switch, left = (
                ("SHIFCON_CUDA", "the CUDA library") if name == "cuda" else ("SHIFCON_NATIVE", "it")
            )
            hint = f"The compiled extension ({name}) failed; {switch}=0 installs without {left}."
            raise CompileError(f"{error}\n{hint}") from None


try:
    compiled, lacking = libraries()
except BuildError as error:
    raise SystemExit(f"error: {error}") from None
# The libraries hold nothing of Python's ABI, so one wheel serves every version that has a stable one.
one_for_all = compiled and not sysconfig.get_config_var("Py_GIL_DISABLED")
setup(
    # kernels/ stands beside the package, and is installed inside of it: under its own name it would shadow Hugging
    # Face's `kernels`, which transformers and bitsandbytes import.
    packages=[*find_packages(include=["shifcon_fast*"]), "shifcon_fast.kernels"],
    package_dir={"shifcon_fast.kernels": "kernels"},
    ext_modules=[Extension(f"{PACKAGE}.{name}", [], py_limited_api=True) for name in compiled],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if one_for_all else {},
)
