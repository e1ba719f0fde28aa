"""The package's version, and those of the packages that numbers depend on, for the files that record them."""

from __future__ import annotations

import platform
from importlib import metadata

__version__ = "0.1.0"

_PACKAGES = ("shifcon-fast", "torch", "transformers", "peft", "bitsandbytes")


def package_versions() -> dict[str, str]:
    """Of Python and the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
