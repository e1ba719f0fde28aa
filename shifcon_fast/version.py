"""The package's version, and those of the packages that numbers depend on, for the files that record them."""

from __future__ import annotations

import platform
from importlib import metadata

__version__ = "0.1.0"

_PACKAGES = ("shifcon-fast", "torch", "transformers", "peft", "bitsandbytes")


def package_version(package: str) -> str | None:
    """The version of an installed package, or None.

    PyTorch's own says which build it is (2.11.0+cu130); its package's metadata need not.
    """
    if package == "torch":
        import torch  # here, so that asking for this package's version stays quick

        return str(torch.__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def package_versions() -> dict[str, str]:
    """Of Python and the packages that the numbers depend on."""
    found = {package: package_version(package) for package in _PACKAGES}
    return {
        "python": platform.python_version(),
        **{package: version for package, version in found.items() if version is not None},
    }
