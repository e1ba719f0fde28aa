#!/usr/bin/env bash
# Does a wheel that was built elsewhere work here, without a compiler?
#
#     scripts/check_wheel.sh WHEEL PYTHON [OUT]
#
# PYTHON is an interpreter whose environment has torch, the package's other dependencies and pytest; it stays as it is.
# The wheel is unpacked into a folder of its own, the operator tests are copied beside it, and both run with nothing on
# the PATH that compiles. With OUT, what is printed is also written to OUT/<python>-<torch>.txt.
set -euo pipefail

wheel=$(realpath "$1")
python=$(realpath -s "$2")
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip install --quiet --no-index --no-deps --target "$work/installed" "$wheel"
mkdir -p "$work/tests/native" "$work/bin"
cp -r "$repository"/tests/{conftest.py,ops,contract} "$work/tests"
# Of tests/native what is about the operators; the rest is about the source tree.
for test in "$repository"/tests/native/test_*.py; do
    if ! grep -qE 'csrc|parents\[' "$test"; then cp "$test" "$work/tests/native"; fi
done

# A few system programs, and no compiler.
for program in uname ldconfig; do
    found=$(PATH=$PATH:/sbin type -P "$program" || true)
    if [[ -n $found ]]; then ln -s "$found" "$work/bin/$program"; fi
done

log=/dev/null
if [[ $# -gt 2 ]]; then
    mkdir -p "$3"
    name=$("$python" -c 'import platform, torch; print(f"python{platform.python_version()}-torch{torch.__version__}")')
    log=$(realpath "$3")/$name.txt
fi

check() {
    for compiler in cc c++ gcc g++ clang clang++ nvcc ninja; do
        if type -P "$compiler"; then echo "there is a compiler: $compiler"; return 1; fi
    done
    echo "wheel     ${wheel##*/}"
    "$python" - <<'PYTHON'
import os, platform, torch, shifcon_fast
from shifcon_fast import doctor
print("python   ", platform.python_version(), platform.machine(), *platform.libc_ver())
print("torch    ", torch.__version__)
print("extension", doctor.native()["cpu"])
assert doctor.native()["cpu"].startswith("works"), "the wheel's library does not load"
assert shifcon_fast.__file__.startswith(os.environ["PYTHONPATH"]), shifcon_fast.__file__
PYTHON
    for level in avx512 avx2 baseline; do
        echo "== SHIFCON_CPU_LEVEL=$level"
        # torch.compile's own code generator needs a compiler.
        SHIFCON_CPU_LEVEL=$level SHIFCON_CONTRACT=native "$python" -m pytest -q -p no:cacheprovider -W ignore \
            --import-mode=importlib --rootdir "$work" --timeout 300 -rs -k 'not inductor' tests 2>&1
    done
}

(
    cd "$work"
    export PYTHONPATH=$work/installed PATH=$work/bin OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    check
) | tee "$log"
