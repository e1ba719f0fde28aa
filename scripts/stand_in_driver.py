"""A driver for Triton where there is no device: kernels are compiled, and launches are handed to a function.

For what of Triton needs no GPU: what its compilers make of a kernel (``aot.py``), which variant a launch chooses
(``tests/kernels/test_launch.py``) and what it costs the host (``benchmarks/launch_time.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from types import SimpleNamespace
from typing import Any


def activate(target: tuple[str, int | str, int], launch: Callable[..., None] = lambda *_: None) -> None:
    """Triton's active driver becomes one whose only device is a ``target``: its backend, architecture, warp size.

    Args:
        launch: called as Triton calls a backend's launcher: three sizes of the grid, the stream, the function, ….
            The function is the kernel's name and the SHA-256 of what it was compiled to.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    def load_binary(name: str, binary: bytes, *_: Any) -> tuple[str, tuple[str, str], int, int, int]:
        return name, (name, sha256(binary).hexdigest()), 0, 0, 1024

    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
            get_current_target=lambda: GPUTarget(*target),
            launcher_cls=lambda *_: launch,
            utils=SimpleNamespace(
                load_binary=load_binary,
                unload_module=lambda _: None,
                get_device_properties=lambda _: {"max_shared_mem": 227 * 1024},
            ),
        )
    )
