"""Launches that Triton is not asked about again, against its own; sizes of grids, against its slower functions."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip(
    "triton", reason="what is launched is compared with triton's; pip install triton"
)
import triton.language as tl  # noqa: E402 - needs Triton
from shifcon_fast.kernels import launch  # noqa: E402 - needs Triton

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_sizes_are_those_of_triton() -> None:
    for number in (*range(1, 300), 4095, 4096, 4097, 2**31 - 1, 2**31, 2**40 + 1):
        assert launch.next_power_of_2(number) == triton.next_power_of_2(number)
        for divisor in (1, 2, 3, 64, 132):
            assert launch.ceil_div(number, divisor) == triton.cdiv(number, divisor)
    assert launch.ceil_div(0, 8) == 0


@pytest.mark.parametrize(
    ("release", "compared"),
    [("3.4.1", False), ("3.5.0", True), ("3.9.0+git1", True), ("3.10.0", False), ("4.0.0", False)],
)
def test_a_release_that_may_specialise_on_more_launches_itself(release: str, compared: bool) -> None:
    assert launch._is_compared(release) == compared
    assert launch._is_compared(triton.__version__), (
        "compare the launches below with it, then say so in launch.py"
    )


# --- launches, of which Triton's are the oracle


@triton.jit(do_not_specialize=["rows"])
def _kernel(  # noqa: PLR0917 - a kernel
    x_ptr, bias_ptr, rows: tl.int64, stride, eps: tl.float32, STYLE: tl.constexpr, BLOCK: tl.constexpr
):
    """Wide loads, where pointers and stride allow them: what a variant assumes of them is seen in its code."""
    column = tl.arange(0, BLOCK)
    at = x_ptr + tl.program_id(0) * stride + column
    x = tl.load(at).to(tl.float32) + eps
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column)
    if STYLE == "twice":
        x *= 2
    tl.store(at, x, mask=column < rows)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """What reached the driver, a stand-in for an H100's: (grid, stream, function, …, arguments) of each launch."""
    if torch.cuda.is_available() or launch.JITFunction is not type(_kernel):
        pytest.skip(
            "needs kernels to be compiled, and launched by no real driver: no GPU, no TRITON_INTERPRET"
        )
    monkeypatch.syspath_prepend(str(SCRIPTS))
    seen: list[tuple[Any, ...]] = []
    active = triton.runtime.driver
    monkeypatch.setattr(active, "_active", active._active)  # it comes back at the end
    importlib.import_module("stand_in_driver").activate(
        ("cuda", 90, 32), lambda *launched: seen.append(launched)
    )
    monkeypatch.setattr(launch, "_caches", lambda device_type: True)
    yield seen
    for name in [name for name in sys.modules if name.startswith("shifcon_fast.kernels.")]:
        for found in vars(sys.modules[name]).values():
            if isinstance(found, launch.CachedLaunch):  # what it holds would go to this stand-in
                found._compiled.clear()
                found.kernel.device_caches.clear()
    _kernel.device_caches.clear()


def described(launched: tuple[Any, ...]) -> list[Any]:
    """A launch without the addresses of tensors and the dictionary for hooks (6), which are new each time."""
    return [
        (value.dtype, value.shape, value.stride()) if isinstance(value, torch.Tensor) else value
        for value in (*launched[:6], *launched[7:])
    ]


def test_every_variant_is_the_one_that_triton_chooses(launches: list[tuple[Any, ...]]) -> None:
    """All that Triton tells apart is told apart, whatever came before, and launched with its own arguments."""
    cached = launch.cached_launch(_kernel)
    memory = torch.zeros(4096)
    pointers = [
        memory,
        memory[1:],
        memory[4:],
        memory.bfloat16(),
        memory.bfloat16()[1:],
        torch.zeros(64).half(),
    ]
    numbers = (1, 2, 15, 16, 17, 0, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 1, 2**40)
    plain: dict[str, Any] = {"STYLE": "once", "BLOCK": 1024, **launch.options(128)}
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, bias, 8, 16, 0.5), plain) for x in pointers for bias in (None, memory, memory[1:])
    ]
    calls += [((memory, None, rows, stride, 0.5), plain) for rows in (1, 8, 2**31) for stride in numbers]
    calls += [((memory, None, rows, 3, eps), plain) for rows in numbers for eps in (0.0, 1.0)]
    for changed in (
        {"STYLE": "twice"},
        {"BLOCK": 512},
        {"STYLE": "twice", "BLOCK": 512},
        launch.options(256),
        launch.options(128, 3),
        launch.options(128, fuse=False),
    ):
        calls.append(((memory, None, 8, 16, 0.5), plain | changed))
    oracle = []
    for arguments, constants in calls:
        _kernel[4, 3](*arguments, **constants)
        oracle.append(launches.pop())
    assert len({launched[4] for launched in oracle}) > 12  # the calls do differ in what they need
    order = random.Random(0)
    for _ in range(3):
        for number in order.sample(range(len(calls)), len(calls)):
            arguments, constants = calls[number]
            compiled = cached[4, 3](*arguments, **constants)
            launched = launches.pop()
            assert compiled.function == launched[4] == oracle[number][4]
            assert all(one is other for one, other in zip(launched[9:], oracle[number][9:], strict=True))
            assert launched[:4] == oracle[number][:4] == (4, 3, 1, 0)
            assert launched[5] == oracle[number][5]
            assert launched[7:9] == oracle[number][7:9]
    assert not launches


def small_calls() -> dict[str, Callable[[], object]]:
    """Every launcher on small tensors; each path of them that launches something else."""
    from shifcon_fast.kernels import add_shift_rms_norm, contrastive_similarity, info_nce, masked_mean_pool

    x, weight, table = torch.randn(2, 4, 256), torch.rand(256), torch.randn(4, 256)
    index, mask = torch.tensor([1, -1]), torch.ones(2, 4, dtype=torch.bool)
    long, a, many = torch.randn(2, 70_000), torch.randn(2, 16, 256), torch.randn(1, 200, 64)

    def norm(x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor) -> None:
        _, h, rstd = add_shift_rms_norm.forward(x, weight, x, table, index, 1e-6, "llama")
        for trained in (False, True):
            add_shift_rms_norm.backward(x, x, h, weight, rstd, index, 4, "llama", True, trained, trained)

    def pool() -> None:
        pooled, factor = masked_mean_pool.forward(x, mask, True)
        masked_mean_pool.backward(pooled, pooled, factor, mask, x.dtype, True)

    def loss(a: torch.Tensor, recenter: bool) -> None:
        found, rows, columns = info_nce.forward(a, a, 20.0, True, recenter)
        info_nce.backward(found, a, a, rows, columns, 20.0, True, recenter, True, True)

    def similarity() -> None:
        s = contrastive_similarity.forward(a, a, 20.0, True, True)
        contrastive_similarity.backward(s, a, a, 20.0, True, True, True, True)

    return {
        "norm": lambda: norm(x, weight, table),
        "norm, long rows": lambda: norm(long, torch.rand(70_000), torch.randn(4, 70_000)),
        "pool": pool,
        "info_nce": lambda: loss(a, False),
        "info_nce, tiled": lambda: loss(many, True),
        "similarity": similarity,
    }


@pytest.mark.slow("compiles kernels")
def test_launchers_launch_what_triton_would(
    launches: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, call in small_calls().items():
        with monkeypatch.context() as patch:
            patch.setattr(launch, "_caches", lambda device_type: False)
            call()
        oracle = [described(launched) for launched in launches]
        launches.clear()
        for _ in range(3):
            call()
            assert [described(launched) for launched in launches] == oracle, name
            launches.clear()
        assert len(oracle) > 1, name


def test_every_kernel_that_is_launched_is_cached() -> None:
    """A kernel that a launcher launches without the decorator works, and is slow on the host."""
    import ast

    for path in Path(launch.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        launched = {
            call.func.value.id
            for call in ast.walk(tree)
            if isinstance(call, ast.Call)
            and isinstance(call.func, ast.Subscript)
            and isinstance(call.func.value, ast.Name)
            and call.func.value.id.startswith("_")
        }
        decorated = {
            function.name
            for function in tree.body
            if isinstance(function, ast.FunctionDef)
            and any(
                isinstance(each, ast.Name) and each.id == "cached_launch" for each in function.decorator_list
            )
        }
        assert decorated == launched, path.name
