"""``subspace_project`` of the CUDA library, against the formula in float64.

Without a device the kernels' sources run on an emulator, thread by thread (``tests/native/test_cuda_emulated.py``,
which lets SHIFCON_EMULATED_LIBRARY name the library it built); what needs a device asks for the fixture ``cuda``.
"""

# ruff: noqa: PLR0917 - a problem is told by its sizes

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from shifcon_fast import _native, ops
from shifcon_fast.ops import native_cuda
from shifcon_fast.ops.reference import projection as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# rows, hidden, rank, languages: odd sizes; more than a tile (64, 128); more ranks than registers (128) and than
# shared memory (256) hold; hidden sizes that are split between blocks; more languages than rows.
SHAPES = [
    *[(1, 1, 1, 1), (7, 33, 5, 3), (300, 200, 16, 3), (150, 136, 70, 2), (20, 96, 0, 2), (33, 150, 140, 2)],
    *[(20, 304, 300, 1), (140, 600, 64, 2), (5, 24, 24, 40)],
]


@pytest.fixture(scope="module", autouse=True)
def _library(device: torch.device) -> None:
    emulated = os.environ.get("SHIFCON_EMULATED_LIBRARY")
    if device.type == "cpu":
        if emulated is None:
            pytest.skip("needs a CUDA device, or the library that tests/native/test_cuda_emulated.py builds")
        torch.ops.load_library(emulated)
    else:
        assert _native.load("cuda") is None, _native.load("cuda")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that a kernel forgot to write holds NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def problem(
    rows: int,
    hidden: int,
    rank: int,
    languages: int,
    dtype: torch.dtype,
    device: torch.device,
    spread: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, mean, basis, source, target; means are ``spread`` times as large as what varies around them."""
    basis = torch.linalg.qr(torch.randn(languages, hidden, max(rank, 1)))[0][..., :rank]
    mean = spread * torch.randn(languages, hidden)
    source, target = torch.randint(-1, languages, (2, rows))
    x = (torch.randn(rows, hidden) + mean[source.clamp(min=0)]).to(dtype)
    return tuple(t.to(device) for t in (x, mean, basis, source, target))


def plain(x: Tensor, mean: Tensor, basis: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """As one writes it in PyTorch, in the dtype of x."""
    mean, basis = mean.to(x.dtype), basis.to(x.dtype)
    result = x.clone()
    for language in range(mean.shape[0]):
        rows = ((target == language) & (source >= 0)).nonzero().squeeze(-1)
        centred = x[rows] - mean[source[rows]]
        result = result.index_copy(0, rows, centred @ basis[language] @ basis[language].T + mean[language])
    return result


def assert_within_rule(ours: Tensor, ordinary: Tensor, oracle: Tensor) -> None:
    """error(ours) <= 2 x error(plain PyTorch at the same dtype) + rounding, both against float64."""
    assert ours.shape == oracle.shape
    if oracle.numel() == 0:
        return
    ours, ordinary = ours.cpu(), ordinary.cpu()
    error, allowed = ((t.double() - oracle).abs().max().item() for t in (ours, ordinary))
    ulps = 4 * torch.finfo(torch.float32).eps + torch.finfo(ours.dtype).eps / 2
    assert error <= 2 * allowed + ulps * max(1.0, oracle.abs().max().item()), (error, allowed)


def check(arguments: tuple[Tensor, ...]) -> None:
    """Values and all three gradients."""
    x, mean, basis, source, target = arguments
    wide = [t.double().cpu() if t.is_floating_point() else t.cpu() for t in arguments]
    moved = native_cuda.forward(*arguments)
    assert moved.dtype == x.dtype
    assert moved.is_contiguous()
    assert_within_rule(moved, plain(*arguments), reference.forward(*wide))
    upper = torch.randn(x.shape, device=x.device).to(x.dtype)
    ours = native_cuda.backward(upper, *arguments, True, True, True)
    exact = reference.backward(upper.double().cpu(), *wide, True, True, True)
    leaves = [t.detach().clone().requires_grad_() for t in (x, mean, basis)]
    ordinary = torch.autograd.grad(plain(*leaves, source, target), leaves, upper, materialize_grads=True)
    assert [t.dtype for t in ours] == [x.dtype, torch.float32, torch.float32]
    for one, common, oracle in zip(ours, ordinary, exact, strict=True):
        assert one.is_contiguous()
        assert_within_rule(one, common, oracle)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_values_and_gradients(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    check(problem(*shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [30.0, 3000.0])
def test_means_much_larger_than_the_spread(spread: float, dtype: torch.dtype, device: torch.device) -> None:
    """Also where only the source's mean is large, so that the result's own rounding hides nothing."""
    for far in (slice(None), slice(0, 1)):
        x, mean, basis, source, target = problem(90, 72, 9, 2, dtype, device)
        source, target = torch.zeros_like(source), torch.ones_like(target)
        mean[far] *= spread
        mean = mean.to(dtype).float()  # so that plain PyTorch is not handicapped by rounding it
        x = (torch.randn(90, 72, device=device) + mean[0]).to(dtype)
        check((x, mean, basis, source, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_massive_activations(dtype: torch.dtype, device: torch.device) -> None:
    """Two numbers of every row are near float16's end; what is formed on the way stays finite."""
    x, mean, basis, source, target = problem(40, 96, 8, 2, dtype, device)
    x[:, 3], x[:, 50] = 60000.0, -60000.0
    mean[:, 3] = -30000.0
    basis[:, :, 0] = 0.0  # along both, so that the first coefficient is beyond float16
    basis[:, 3, 0], basis[:, 50, 0] = 0.5**0.5, -(0.5**0.5)
    wide = [t.double().cpu() if t.is_floating_point() else t.cpu() for t in (x, mean, basis, source, target)]
    oracle = reference.forward(*wide)
    moved = native_cuda.forward(x, mean, basis, source, target).cpu().double()
    fits = oracle.abs() < 60000
    assert torch.isfinite(moved[fits]).all()
    # c, V and the coefficients are rounded, each by half an ulp at most; |V| |Vᵀ| |c| bounds what that does.
    eps = torch.finfo(dtype).eps
    length = 90000.0 * 2**0.5 + 96**0.5 * 4
    assert (moved - oracle)[fits].abs().max() <= 4 * eps * length


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_stay_do_so_bit_for_bit(dtype: torch.dtype, device: torch.device) -> None:
    for hidden in (8, 9):
        x, mean, basis, _, _ = problem(6, hidden, 3, 2, dtype, device)
        x[:5, 0] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-7, -0.0])
        source = torch.tensor([-1, 0, -1, 2, 2**31 - 1, 1], dtype=torch.int32, device=device)
        target = torch.tensor([0, -1, -1, 0, 1, 0], dtype=torch.int32, device=device)
        moved = native_cuda.forward(x, mean, basis, source, target)
        assert torch.equal(moved[:5].view(BITS[dtype]), x[:5].view(BITS[dtype]))
        assert not torch.equal(moved[5], x[5])
        upper = torch.randn_like(x)
        gradient, of_mean, of_basis = native_cuda.backward(
            upper, x, mean, basis, source, target, True, True, True
        )
        assert torch.equal(gradient[:5], upper[:5])
        expected = reference.backward(upper[5:], x[5:], mean, basis, source[5:], target[5:], True, True, True)
        tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
        for ours, wanted in zip((of_mean, of_basis), expected[1:], strict=True):
            torch.testing.assert_close(ours, wanted, **tolerance)


def test_ids_out_of_range_move_nothing_and_read_nothing(device: torch.device) -> None:
    x, mean, basis, source, _ = problem(5, 16, 4, 3, torch.bfloat16, device)
    far = torch.tensor([3, -2, 2**40, -(2**40), 2**32], device=device)
    for ids in ((far, source.clamp(min=0)), (source.clamp(min=0), far)):
        assert torch.equal(native_cuda.forward(x, mean, basis, *ids), x)
        found = native_cuda.backward(x, x, mean, basis, *ids, True, True, True)
        assert torch.equal(found[0], x)
        assert not found[1].any()
        assert not found[2].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(dtype: torch.dtype, device: torch.device) -> None:
    x, mean, basis, _, _ = problem(70, 40, 6, 1, dtype, device)
    ids = torch.zeros(70, dtype=torch.long, device=device)
    clean = native_cuda.forward(x, mean, basis, ids, ids)
    others = [row for row in range(70) if row not in (9, 30)]
    x[9, 7], x[30, 3] = float("nan"), float("inf")
    moved = native_cuda.forward(x, mean, basis, ids, ids)
    assert torch.equal(moved[others], clean[others])
    assert moved[9].isnan().all()
    assert not torch.isfinite(moved[30]).any()


def test_every_subset_of_the_gradients(device: torch.device) -> None:
    arguments = problem(70, 24, 5, 3, torch.bfloat16, device)
    upper = torch.randn_like(arguments[0])
    everything = native_cuda.backward(upper, *arguments, True, True, True)
    for needs in itertools.product((False, True), repeat=3):
        x = arguments[0] if needs[2] else None
        found = native_cuda.backward(upper, x, *arguments[1:], *needs)
        for one, wanted, needed in zip(found, everything, needs, strict=True):
            assert (one is not None) == needed
            if needed and needs[1]:  # rows within a language are in the same order
                assert torch.equal(one, wanted)
            elif needed:
                torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_shapes_of_ids_and_dtypes_of_tables_do_not_matter(
    dtype: torch.dtype, device: torch.device
) -> None:
    x, mean, basis, source, target = problem(60, 32, 16, 3, dtype, device)
    expected = native_cuda.forward(x, mean, basis, source, target)
    in_two = x.reshape(4, 15, 32)
    padded = torch.zeros(60, 48, dtype=dtype, device=device)
    padded[:, 8:40] = x
    shifted = torch.zeros(60 * 32 + 1, dtype=dtype, device=device)[1:].view(60, 32)  # no 128-bit alignment
    shifted.copy_(x)
    every_second = torch.zeros(60, 2, 32, dtype=dtype, device=device)
    every_second[:, 1] = x
    for same in (x.T.contiguous().T, padded[:, 8:40], shifted, every_second[:, 1], in_two):
        ids = [t.reshape(same.shape[:-1]) for t in (source, target)]
        for pair in (ids, [i.int() for i in ids], [i.mT.contiguous().mT if i.ndim == 2 else i for i in ids]):
            moved = native_cuda.forward(same, mean, basis, *pair)
            assert moved.is_contiguous()
            assert torch.equal(moved.reshape(60, 32), expected)
    tables = (mean.T.contiguous().T, basis.mT.contiguous().mT)
    assert torch.equal(native_cuda.forward(x, *tables, source, target), expected)
    tables = (mean.double(), basis.double())
    assert torch.equal(native_cuda.forward(x, *tables, source, target), expected)
    tables = (mean, torch.cat([torch.zeros(1, device=device, dtype=dtype), basis.to(dtype).flatten()])[1:])
    assert torch.equal(native_cuda.forward(x, mean, tables[1].view_as(basis), source, target), expected)
    per_batch = torch.tensor([2, -1, 0, 1], device=device)
    spread = per_batch[:, None].expand(4, 15)
    one, other = (native_cuda.forward(in_two, mean, basis, ids, ids) for ids in (per_batch, spread))
    assert torch.equal(one, other)
    alone = torch.tensor(1, device=device)
    assert native_cuda.forward(x[0], mean, basis, alone, alone).shape == (32,)
    summed = native_cuda.backward(
        torch.ones((), device=device, dtype=dtype).expand(60, 32),
        x,
        mean,
        basis,
        source,
        target,
        True,
        True,
        True,
    )
    dense = native_cuda.backward(torch.ones_like(x), x, mean, basis, source, target, True, True, True)
    assert all(torch.equal(a, b) for a, b in zip(summed, dense, strict=True))


def test_nothing_to_do(device: torch.device) -> None:
    _, mean, basis, _, _ = problem(1, 8, 2, 3, torch.float32, device)
    none = torch.zeros(0, dtype=torch.long, device=device)
    empty = torch.zeros(0, 8, device=device)
    assert native_cuda.forward(empty, mean, basis, none, none).shape == (0, 8)
    found = native_cuda.backward(empty, empty, mean, basis, none, none, True, True, True)
    assert [t.shape for t in found] == [(0, 8), (3, 8), (3, 8, 2)]
    assert not any(t.any() for t in found)
    x, nobody = torch.randn(4, 8, device=device), torch.full((4,), -1, device=device)
    no_tables = (torch.zeros(0, 8, device=device), torch.zeros(0, 8, 2, device=device))
    assert torch.equal(native_cuda.forward(x, *no_tables, nobody, nobody), x)
    found = native_cuda.backward(x, x, *no_tables, nobody, nobody, True, True, True)
    assert torch.equal(found[0], x)
    assert [t.shape for t in found[1:]] == [(0, 8), (0, 8, 2)]


def test_the_same_bits_twice(device: torch.device) -> None:
    arguments = problem(400, 72, 20, 4, torch.bfloat16, device)
    upper = torch.randn_like(arguments[0])
    runs = [
        [native_cuda.forward(*arguments), *native_cuda.backward(upper, *arguments, True, True, True)]
        for _ in range(2)
    ]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [40, 37])
def test_nothing_is_read_past_the_end(
    hidden: int, dtype: torch.dtype, device: torch.device, guarded: Callable[[Tensor], Tensor]
) -> None:
    """In the emulation, inputs end at a page that must not be touched; on a device, with the allocation."""
    x, mean, basis, source, target = problem(67, hidden, 16, 2, dtype, device)
    basis = basis.to(dtype)  # so that it is used as it is
    check(tuple(guarded(t) for t in (x, mean, basis, source, target)))


@pytest.fixture
def guarded(device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    maps = []
    libc = ctypes.CDLL(None, use_errno=True)

    def copy(tensor: Tensor) -> Tensor:
        if device.type != "cpu":
            return tensor.clone()
        pages = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert libc.mprotect(ctypes.c_void_p(address + pages), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        maps.append((memory, address + pages))
        result = torch.frombuffer(
            memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - tensor.nbytes
        ).view(tensor.shape)
        return result.copy_(tensor)

    yield copy
    for _, address in maps:
        libc.mprotect(
            ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE
        )


def test_many_languages(device: torch.device) -> None:
    """More groups than one round of the scan takes; the gradient of the mean is quadratic in the languages."""
    arguments = problem(600, 16, 2, 700, torch.float32, device)
    wide = [t.double().cpu() if t.is_floating_point() else t.cpu() for t in arguments]
    moved = native_cuda.forward(*arguments)
    assert_within_rule(moved, plain(*arguments), reference.forward(*wide))
    check(problem(300, 16, 2, 40, torch.float32, device))


@pytest.mark.parametrize("rows", [16384, 16385])
def test_rows_that_one_block_sorts_and_one_more(rows: int, device: torch.device) -> None:
    """Both ways of sorting, and in the gradients the second sort, by source, of what the first has sorted."""
    check(problem(rows, 16, 2, 3, torch.float32, device))


def test_operator_check(cuda: torch.device) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # opcheck compares what it leaves uninitialised
    )
    for dtype in DTYPES:
        x, mean, basis, source, target = problem(9, 16, 3, 2, dtype, cuda)
        leaves = [t.requires_grad_() for t in (x, mean, basis)]
        torch.library.opcheck(
            torch.ops.shifcon_fast.subspace_project.default, (*leaves, source, target, "native")
        )


def test_it_is_the_backend_that_is_chosen(cuda: torch.device) -> None:
    reports = [r for r in ops.backend_report() if r.operator == "subspace_project" and "cuda" in r.device]
    assert [r.chosen for r in reports] == ["native"] * torch.cuda.device_count()


def test_a_captured_graph_with_every_gradient(cuda: torch.device) -> None:
    held = problem(300, 96, 12, 3, torch.bfloat16, cuda)
    upper = torch.randn_like(held[0])

    def run() -> list[Tensor]:
        return [native_cuda.forward(*held), *native_cuda.backward(upper, *held, True, True, True)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for old, new in zip(held, problem(300, 96, 12, 3, torch.bfloat16, cuda), strict=True):
        old.copy_(new)
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, run(), strict=True))


def test_another_device_than_the_current_one(cuda: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    check(problem(70, 40, 8, 2, torch.bfloat16, torch.device("cuda", 1)))
    assert torch.cuda.current_device() == 0


def test_more_than_two_to_the_31_elements(cuda: torch.device) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    if total < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of GPU memory, this device has {total / 2**30:.0f}")
    torch.utils.deterministic.fill_uninitialized_memory = False
    hidden, rows = 4096, 2**19 + 3
    last, mean, basis, _, _ = problem(3, hidden, 16, 2, torch.bfloat16, cuda)
    x = torch.zeros(rows, hidden, device=cuda, dtype=torch.bfloat16)
    x[-3:] = last
    ids = torch.full((rows,), -1, device=cuda)
    ids[-3:] = torch.tensor([1, -1, 0], device=cuda)
    moved = native_cuda.forward(x, mean, basis, ids, ids)
    # How far the hidden size is split depends on the number of rows, and so does the order of the sums.
    torch.testing.assert_close(
        moved[-3:], native_cuda.forward(last, mean, basis, ids[-3:], ids[-3:]), rtol=1e-2, atol=1e-2
    )
    assert not moved[:-3].any()
