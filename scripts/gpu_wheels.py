"""Fill ``wheels/`` with what a bare CUDA machine lacks, so that nothing has to be fetched or compiled there.

    python scripts/gpu_wheels.py             build and download what is not there yet, then check
    python scripts/gpu_wheels.py --check     only check: is it all there, of these sources, and small enough?

The package itself is built here, with its CPU and CUDA libraries (nvcc is needed, a GPU is not). With it go, for
Python 3.12 on x86-64, what it imports and an image of PyTorch with Hugging Face's libraries does not have, NF4, and
the benchmarks' peer. ``scripts/gpu_check.py`` takes the compiled libraries from the wheel if ``wheels/csrc.sha256``
says that they are of the sources it finds, and everything else from the sources themselves. The working tree and
the wheels together must stay below 64 MiB.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "wheels"
MOST_BYTES = 64 * 2**20
PYTHON = "3.12"
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)), "manylinux2014_x86_64")
# Those of the lock have its versions.
PINNED = {"liger-kernel": "0.8.5"}
PACKAGES = (
    *("bitsandbytes", "peft", "liger-kernel", "pytest-benchmark", "py-cpuinfo2"),
    *("langcodes", "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions"),
)
# What is imported there and need not be brought; a test compares this with what is imported here.
EXPECTED = frozenset(
    (
        *(
            "accelerate",
            "anyio",
            "charset-normalizer",
            "filelock",
            "fsspec",
            "h11",
            "huggingface-hub",
            "idna",
        ),
        *(
            "iniconfig",
            "jinja2",
            "markupsafe",
            "mpmath",
            "networkx",
            "numpy",
            "packaging",
            "pandas",
            "pillow",
        ),
        *(
            "pluggy",
            "protobuf",
            "psutil",
            "pyarrow",
            "pygments",
            "pytest",
            "python-dateutil",
            "pyyaml",
            "regex",
        ),
        *(
            "safetensors",
            "scipy",
            "setuptools",
            "sympy",
            "tokenizers",
            "torch",
            "tqdm",
            "transformers",
            "triton",
        ),
        "xxhash",
    )
)
OURS = "shifcon_fast"
# Libraries of bitsandbytes for CUDA that no PyTorch from 2.10 on has, and for other devices: half of its wheel.
NOT_LOADED = re.compile(r"bitsandbytes/libbitsandbytes_(rocm|xpu|cuda11|cuda12[0-5])\d*\.so")


def digest(sources: Path = ROOT / "csrc") -> str:
    """SHA-256 over the names and contents of the C++ and CUDA sources."""
    found = hashlib.sha256()
    for file in sorted(path for path in sources.rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")):
        found.update(f"{file.relative_to(sources)}\0".encode())
        found.update(file.read_bytes())
    return found.hexdigest()


def versions(lock: Path = ROOT / "requirements.lock") -> dict[str, str]:
    """The version of each package that is brought along."""
    lines = re.findall(r"^(\S+)==(\S+)$", lock.read_text(encoding="utf-8"), re.MULTILINE)
    locked = {name.lower().replace("_", "-"): version for name, version in lines}
    return {name: PINNED.get(name) or locked[name] for name in PACKAGES}


def wheel_of(folder: Path, name: str, version: str | None = None) -> Path | None:
    """The wheel of a package (of one version) in a folder."""
    found = sorted(folder.glob(f"{name.replace('-', '_')}-{version or '*'}-*.whl"))
    return found[-1] if found else None


def tree_bytes(root: Path = ROOT) -> int:
    """The size of the working tree: files that git tracks or does not ignore."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return sum((root / name).lstat().st_size for name in set(listed) if name and (root / name).is_file())


def problems(folder: Path = WHEELS, tree: int | None = None) -> list[str]:
    """What is missing, of other sources, doubled, or too large."""
    found = []
    wanted: dict[str, str | None] = {**versions(), OURS: None}
    for name, version in wanted.items():
        if wheel_of(folder, name, version) is None:
            found.append(f"{folder.name}/ has no wheel of {name} {version or ''}".rstrip())
        if len(list(folder.glob(f"{name.replace('-', '_')}-*.whl"))) > 1:
            found.append(f"{folder.name}/ has several wheels of {name}, which cannot be installed together")
    recorded = folder / "csrc.sha256"
    if not recorded.exists() or recorded.read_text(encoding="utf-8").strip() != digest():
        found.append(f"the libraries in {folder.name}/ were not built from csrc/ as it is now")
    brought = sum(file.stat().st_size for file in folder.glob("*.whl"))
    size = tree_bytes() if tree is None else tree
    if brought + size > MOST_BYTES:
        found.append(f"wheels {brought / 2**20:.1f} MiB and tree {size / 2**20:.1f} MiB are more than 64 MiB")
    return found


def build(folder: Path) -> None:
    """The package's wheel with both libraries, from a copy of the sources."""
    for old in folder.glob(f"{OURS}-*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        unwanted = (
            ".venv",
            ".git",
            "wheels",
            "build",
            "dist",
            "__pycache__",
            ".*_cache",
            "*.egg-info",
            "*.so",
        )
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*unwanted))
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
        environment = {**os.environ, "SHIFCON_NATIVE": "1", "SHIFCON_CUDA": "1"}
        subprocess.run([*command, "-w", str(folder), str(source)], env=environment, check=True)
    (folder / "csrc.sha256").write_text(digest() + "\n", encoding="utf-8")


def download(folder: Path, missing: dict[str, str]) -> None:
    for name in missing:
        for old in folder.glob(f"{name.replace('-', '_')}-*.whl"):
            old.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    target = ["--python-version", PYTHON, "--implementation", "cp"]
    target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    wanted = [f"{name}=={version}" for name, version in missing.items()]
    subprocess.run([*command, *target, "-d", str(folder), *wanted], check=True)


def leave_out(wheel: Path, unwanted: re.Pattern[str] = NOT_LOADED) -> None:
    """Take the files of these names out of a wheel and of the list of files in it."""
    with zipfile.ZipFile(wheel) as whole:
        kept = [entry for entry in whole.infolist() if not unwanted.fullmatch(entry.filename)]
        if len(kept) == len(whole.infolist()):
            return
        smaller = wheel.with_suffix(".part")
        with zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as written:
            for entry in kept:
                content = whole.read(entry)
                if entry.filename.endswith(".dist-info/RECORD"):
                    rows = content.decode().splitlines(keepends=True)
                    content = "".join(
                        row for row in rows if not unwanted.fullmatch(row.split(",")[0])
                    ).encode()
                written.writestr(entry, content)
    smaller.replace(wheel)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="build and download nothing")
    options = parser.parse_args(arguments)
    WHEELS.mkdir(exist_ok=True)
    if not options.check:
        missing = {n: v for n, v in versions().items() if wheel_of(WHEELS, n, v) is None}
        if missing:
            download(WHEELS, missing)
        for file in WHEELS.glob("bitsandbytes-*.whl"):
            leave_out(file)
        recorded = WHEELS / "csrc.sha256"
        current = recorded.exists() and recorded.read_text(encoding="utf-8").strip() == digest()
        if not current or wheel_of(WHEELS, OURS) is None:
            build(WHEELS)
    for file in sorted(WHEELS.glob("*.whl")):
        print(f"{file.stat().st_size / 2**20:6.2f} MiB  {file.name}")
    print(f"{tree_bytes() / 2**20:6.2f} MiB  the working tree")
    found = problems()
    for problem in found:
        print(f"not ready: {problem}", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
