"""The kernels are a room of their own, and their folder's name is not in the way of Hugging Face's ``kernels``."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shifcon_fast import ops

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = sorted((REPOSITORY / "kernels").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_import_torch_triton_and_each_other_only(file: Path) -> None:
    allowed = {"torch", "triton", "__future__", "typing", "contextlib", "functools"}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            assert node.module.split(".")[0] in allowed


@pytest.mark.parametrize("name", ["atomic", "autotune", "libdevice"])
def test_what_kernels_do_without(name: str) -> None:
    """Atomics are not deterministic, autotuning runs at a user's first call, libdevice breaks the interpreter."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Attribute) and node.attr.startswith(name)), file.name


def test_the_repository_root_is_not_on_the_path() -> None:
    assert str(REPOSITORY) not in sys.path


def test_another_package_named_kernels_stays_what_it_is(tmp_path: Path) -> None:
    """transformers and bitsandbytes import Hugging Face's ``kernels``; ours must not be found under that name."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("WHOSE = 'hugging face'\n", encoding="utf-8")
    code = "import shifcon_fast.kernels, kernels; print(kernels.WHOSE, shifcon_fast.kernels.__name__)"
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["hugging", "face", "shifcon_fast.kernels"]


def test_on_the_cpu_triton_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"impl: got 'triton'.*TRITON_INTERPRET=1"):
        ops.add_shift_rms_norm(x, x[0], impl="triton")
