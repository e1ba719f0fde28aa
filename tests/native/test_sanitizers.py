"""The operators under the address and undefined-behaviour sanitizers, and a harness that can fail.

``make sanitize`` runs every level, and the thread sanitizer over the same tests.
"""

# ruff: noqa: PLR0917 - pytest passes fixtures by name

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow("compiles the CPU kernels with sanitizers, which also run them slowly")


@pytest.fixture(scope="module")
def sanitize() -> ModuleType:
    """scripts/sanitize.py; skips where nothing can be compiled with sanitizers."""
    spec = importlib.util.spec_from_file_location("sanitize", REPOSITORY / "scripts" / "sanitize.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for kind in ("address", "thread"):
        reason = module.missing(kind)
        if reason is not None:
            pytest.skip(f"no {kind} sanitizer: {reason}; install g++ with its sanitizers")
    return module


def output_of(result: subprocess.CompletedProcess[str]) -> str:
    return (result.stdout + result.stderr)[-6000:]


def test_the_operators_read_and_write_only_what_is_theirs(sanitize: ModuleType, tmp_path: Path) -> None:
    library = sanitize.build("address", tmp_path, baseline_only=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--timeout=0"]
    tests = ["tests/contract", "-k", f"({sanitize.SMALL}) and not twice and not opcheck"]
    result = sanitize.run("address", library, [*command, *tests], capture_output=True)
    assert result.returncode == 0, output_of(result)
    assert "[100%]" in result.stdout  # something was collected


CALL = """
import torch
from shifcon_fast import ops
print(ops.masked_mean_pool(torch.ones(8, 3, 64), torch.ones(8, 3).bool(), impl="native").sum().item())
"""
FACTOR = "if (first == 0) p.factor[row] = factor;"


@pytest.mark.parametrize(
    ("kind", "line", "broken", "report"),
    [
        ("address", FACTOR, "if (first == 0) p.factor[row + 1] = factor;", "heap-buffer-overflow"),
        ("address", "++count;", "count += INT64_MAX;", "signed integer overflow"),
        ("thread", FACTOR, "p.factor[0] += factor;", "data race"),
        ("thread", FACTOR, FACTOR, None),
    ],
    ids=["past the end", "overflow", "race", "nothing"],
)
def test_what_is_broken_is_reported(
    kind: str, line: str, broken: str, report: str | None, sanitize: ModuleType, tmp_path: Path
) -> None:
    """A copy of the sources with one line changed; of the operators, it holds the pooling alone."""
    sources = tmp_path / "csrc"
    shutil.copytree(REPOSITORY / "csrc", sources)
    kept = {"levels", "library", "cache", "tensors", "masked_mean_pool"}
    for file in sources.glob("cpu/**/*.cpp"):
        if file.stem not in kept:
            file.unlink()
    kernel = sources / "cpu/kernels/masked_mean_pool.cpp"
    text = kernel.read_text(encoding="utf-8")
    assert text.count(line) == 1
    kernel.write_text(text.replace(line, broken), encoding="utf-8")
    library = sanitize.build(kind, tmp_path / "build", baseline_only=True, sources=sources)
    result = sanitize.run(kind, library, [sys.executable, "-c", CALL], capture_output=True)
    if report is None:
        assert result.returncode == 0, output_of(result)
        assert result.stdout.split() == ["512.0"]
    else:
        assert result.returncode == 99, output_of(result)
        assert report in result.stderr
