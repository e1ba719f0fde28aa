#!/usr/bin/env bash
# Everything that needs a CUDA machine, in one call of at most nine minutes:
#
#     scripts/gpu_check.sh OUT            (PYTHON=python3 to choose the interpreter)
#
# Builds the package into a temporary folder, runs the kernels' contract on the device, the benchmarks beside their
# peers, and compute-sanitizer on the contract's small shapes. Nothing is fetched from anywhere. OUT gets environment.json
# (device, driver, versions, what passed), contract.xml, benchmarks.json and the logs. Exit status 1 if anything failed.
set -uo pipefail

out=$(mkdir -p "${1:?usage: scripts/gpu_check.sh OUT}" && cd "$1" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
deadline=$((SECONDS + 530))
export CUBLAS_WORKSPACE_CONFIG=:4096:8 TRITON_CACHE_DIR="$build/triton" PYTHONDONTWRITEBYTECODE=1
declare -A passed

# run NAME SECONDS COMMAND...: a step with its own limit, within what is left of the nine minutes
run() {
    local name=$1 limit=$2
    shift 2
    local left=$((deadline - SECONDS))
    ((limit < left)) || limit=$left
    if ((limit < 5)); then
        echo "== $name: no time left" | tee "$out/$name.log"
        passed[$name]=false
        return 1
    fi
    echo "== $name (at most $limit s)"
    if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then passed[$name]=true; else passed[$name]=false; fi
    tail -n 40 "$out/$name.log"
}

"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
    echo "$python: no PyTorch that sees a CUDA device; without one, make test checks all that can be checked" >&2
    exit 2
}

# Build. An old setuptools may not read pyproject.toml's licence field; Python and Triton files need no compiler, so a
# copied tree is the same thing.
mkdir "$build/source"
tar -C "$root" --exclude=./.venv --exclude=./.git -cf - . | tar -C "$build/source" -xf -
run build 60 "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation \
    --target "$build/site" "$build/source"
if [[ ${passed[build]} != true || ! -d $build/site/shifcon_fast/kernels ]]; then
    echo "== build: falling back to a copied tree"
    rm -rf "$build/site" && mkdir -p "$build/site"
    cp -r "$root/shifcon_fast" "$build/site/shifcon_fast"
    cp -r "$root/kernels" "$build/site/shifcon_fast/kernels"
    passed[build]='"copied"'
fi
export PYTHONPATH="$build/site${PYTHONPATH:+:$PYTHONPATH}"
cd "$build" || exit 1
pytest=("$python" -P -m pytest --import-mode=importlib -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root" -q)
"$python" -P -c '' 2>/dev/null || pytest=("${pytest[@]/-P/-B}")

run contract 200 "${pytest[@]}" --tb=short --junitxml "$out/contract.xml" "$root/tests/kernels/contract"
for tool in memcheck racecheck; do
    if command -v compute-sanitizer >/dev/null; then
        # Small shapes of every kernel; PyTorch's own allocator would hide an access past a tensor's end.
        run "sanitizer_$tool" 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
            --error-exitcode 9 --target-processes all \
            "${pytest[@]}" --timeout 0 "$root/tests/kernels/contract" \
            -k "(test_values_and_gradient and 7) or (test_loss and 33) or (test_similarity and shape0) or index_per_row"
    else
        echo "== sanitizer_$tool: compute-sanitizer is not installed" | tee "$out/sanitizer_$tool.log"
        passed[sanitizer_$tool]=null
    fi
done
run benchmarks 400 "${pytest[@]}" --timeout 0 --benchmark-json "$out/benchmarks.json" --benchmark-columns median \
    "$root/benchmarks"

{
    for name in "${!passed[@]}"; do echo "$name ${passed[$name]}"; done
} | "$python" -c '
import json, platform, subprocess, sys
from importlib import metadata
import torch
packages = ("torch", "triton", "transformers", "peft", "liger-kernel", "quack-kernels", "inf-cl", "numpy", "pytest")
found = {}
for package in packages:
    try:
        found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
        found[package] = None
query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory"
smi = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=False)
passed = {name: json.loads(value) for name, value in (line.split() for line in sys.stdin)}
print(json.dumps({
    "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    "driver": smi.stdout.strip(), "cuda": torch.version.cuda, "python": platform.python_version(),
    "packages": found, "passed": passed,
}, indent=2, sort_keys=True))
' | tee "$out/environment.json"

for name in "${!passed[@]}"; do
    [[ ${passed[$name]} != false ]] || exit 1
done
