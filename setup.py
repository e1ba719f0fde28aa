"""Where the packages lie; everything else about the build is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    # kernels/ stands beside the package, and is installed inside of it: under its own name it would shadow Hugging
    # Face's `kernels`, which transformers and bitsandbytes import.
    packages=[*find_packages(include=["shifcon_fast*"]), "shifcon_fast.kernels"],
    package_dir={"shifcon_fast.kernels": "kernels"},
)
