"""Optional packages: which extra brings each, and the error where one is needed and not installed.

Operators, attaching and training need no extra. An optional package is imported where it is used, inside
:func:`needed_for`, so that what does without it works without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

EXTRAS = {
    "cli": ("typer", "tensorboard"),
    "eval": ("matplotlib", "py3langid", "babel"),
    "data": ("datasets", "pyarrow"),
    "gguf": ("gguf", "llama_cpp_py_sync"),
    "trl": ("trl",),
    "lm-eval": ("lm_eval",),
}
"""Extra → the modules of the packages that it installs (``pyproject.toml`` has the same)."""


class MissingExtraError(ImportError):
    """An optional package is not installed. The message says what needs it, and which extra brings it."""


@contextmanager
def needed_for(what: str) -> Iterator[None]:
    """Import optional packages inside; ``what`` is the use that they are for, for the message.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        for extra, modules in EXTRAS.items():
            if module in modules:
                raise missing(what, module, extra) from error
        raise


def missing(what: str, module: str, extra: str) -> MissingExtraError:
    """The error for a package that is not installed."""
    return MissingExtraError(
        f'{what} needs {module}, which is not installed: pip install "shifcon-fast[{extra}]"', name=module
    )
