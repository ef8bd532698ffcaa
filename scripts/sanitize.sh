#!/usr/bin/env bash
# Builds the C++ extension with AddressSanitizer and UndefinedBehaviorSanitizer and runs the tests of the CPU kernels on it.
# Torch's memory comes from the sanitizer's malloc, so a read or write one element past a tensor is an error.
# Usage: scripts/sanitize.sh [pytest arguments]      PYTHON=python3 chooses the interpreter (with peftkern's test extras)
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
PYTHON=$(realpath -s "$(command -v "$PYTHON")") # what follows runs in another folder
export PATH="$(dirname "$PYTHON"):$PATH"
WORK=${SANITIZE_DIR:-$(mktemp -d)}
[ -n "${SANITIZE_DIR:-}" ] || trap 'rm -rf "$WORK"' EXIT

mkdir -p "$WORK/run"
cmake -S "$ROOT" -B "$WORK/build" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DPEFTKERN_CUDA=OFF \
  -DPEFTKERN_SANITIZE=address,undefined -DPython_EXECUTABLE="$PYTHON" \
  -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$WORK/lib" >"$WORK/configure.log"
cmake --build "$WORK/build"

# The package without its own build of the extension; the current folder comes first on Python's path.
rm -rf "$WORK/run/peftkern" "$WORK/run/tests"
cp -r "$ROOT/peftkern" "$WORK/run/peftkern"
cp -r "$ROOT/tests" "$WORK/run/tests"
cp "$ROOT/pyproject.toml" "$WORK/run/"
rm -f "$WORK"/run/peftkern/_C.*
cp "$WORK/lib/_C.so" "$WORK/run/peftkern/_C.so"
cd "$WORK/run"

# Leaks are Python's and torch's; vptr needs the C++ runtime of the library under test.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so):$(g++ -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1
[ $# -gt 0 ] || set -- tests/backends/cpu/test_branch.py tests/backends/cpu/test_multi_lora_linear.py tests/backends/cpu/test_values.py \
  tests/backends/cpu/base tests/backends/cpu/test_call.py tests/backends/cpu/test_call_taken.py \
  tests/backends/cpu/test_lora_row_norm.py tests/backends/cpu/rotate \
  tests/backends/cpu/test_bottleneck_adapter.py
export PYTHONMALLOC=malloc OMP_NUM_THREADS=2
"$PYTHON" -c 'import torch, peftkern._C as c, os; print("sanitized:", c.__file__, "best level:", c.isa())'
"$PYTHON" -m pytest -q -p no:cacheprovider "$@"
