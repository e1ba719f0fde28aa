"""Where the packages lie, and the compiled libraries; everything else about the build is in pyproject.toml.

SHIFCON_NATIVE=0 leaves the libraries out, SHIFCON_NATIVE=1 makes it an error if they cannot be compiled; otherwise
an installation without a compiler works, with the reference backend, and says so.
SHIFCON_CUDA=1 compiles the CUDA library where nvcc is (no GPU is needed), 0 leaves it out; otherwise it is compiled
where nvcc is and PyTorch was built for CUDA.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
import ninja_build

CPU, CUDA = "shifcon_fast._native.cpu", "shifcon_fast._native.cuda"


class BuildNative(build_ext):
    """Compile each library with ninja, to where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / ext.name
        build = ninja_build.build_cuda if ext.name == CUDA else ninja_build.build_cpu
        build(ninja_build.find_toolchain(), library, folder, verbose=bool(self.verbose and self.verbose > 1))


def libraries() -> list[Extension]:
    """The libraries that can be compiled here, after a sentence about those that cannot."""
    asked = os.environ.get("SHIFCON_NATIVE")
    if asked == "0":
        return []
    try:
        toolchain = ninja_build.find_toolchain()
    except ninja_build.BuildError as error:
        if asked == "1":
            raise
        print(f"shifcon_fast: building without the compiled extension: {error}", file=sys.stderr)
        return []
    found = [Extension(CPU, [], py_limited_api=True)]
    if wants_cuda(toolchain):
        found.append(Extension(CUDA, [], py_limited_api=True))
    return found


def wants_cuda(toolchain: ninja_build.Toolchain) -> bool:
    """Whether the CUDA library is compiled; asked for without nvcc is an error, never a silent omission."""
    asked = os.environ.get("SHIFCON_CUDA")
    if asked in ("0", "1"):
        return asked == "1"
    import torch

    return torch.version.cuda is not None and toolchain.nvcc is not None


found = libraries()
setup(
    # kernels/ stands beside the package, and is installed inside of it: under its own name it would shadow Hugging
    # Face's `kernels`, which transformers and bitsandbytes import.
    packages=[*find_packages(include=["shifcon_fast*"]), "shifcon_fast.kernels"],
    package_dir={"shifcon_fast.kernels": "kernels"},
    ext_modules=found,
    cmdclass={"build_ext": BuildNative},
    # The libraries hold nothing of Python's ABI, so one wheel serves every version.
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if found else {},
)
