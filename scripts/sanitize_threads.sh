#!/usr/bin/env bash
# Builds the C++ extension with ThreadSanitizer and runs scripts/bank_race.py on it: as it is, which must be clean, and
# with banks that give memory back too early, or change a table in use, which must be reported: else a clean run says
# nothing.
# Usage: scripts/sanitize_threads.sh [SECONDS]        PYTHON=python3 chooses the interpreter
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=$(command -v "${PYTHON:-python3}")
export PATH="$(dirname "$PYTHON"):$PATH"
WORK=${SANITIZE_DIR:-$(mktemp -d)}
[ -n "${SANITIZE_DIR:-}" ] || trap 'rm -rf "$WORK"' EXIT

mkdir -p "$WORK/run"
cmake -S "$ROOT" -B "$WORK/build" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DPEFTKERN_CUDA=OFF -DPEFTKERN_SANITIZE=thread \
  -DPython_EXECUTABLE="$PYTHON" -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$WORK/lib" >"$WORK/configure.log"
cmake --build "$WORK/build"
rm -rf "$WORK/run/peftkern"
cp -r "$ROOT/peftkern" "$WORK/run/peftkern"
rm -f "$WORK"/run/peftkern/_C.*
cp "$WORK/lib/_C.so" "$WORK/run/peftkern/_C.so"
cd "$WORK/run"

# What torch and Python do to memory is not instrumented; their locks are seen all the same. -R: the sanitizer's shadow
# memory must lie where it expects it.
run() {
  PYTHONPATH="$WORK/run" LD_PRELOAD="$(g++ -print-file-name=libtsan.so)" OMP_NUM_THREADS=1 \
    TSAN_OPTIONS="ignore_noninstrumented_modules=1 history_size=4 exitcode=66" \
    setarch "$(uname -m)" -R "$PYTHON" "$ROOT/scripts/bank_race.py" "$@"
}
run --seconds "${1:-60}"
for broken in memory table; do
  if run --seconds 10 --broken $broken >"$WORK/$broken.log" 2>&1 ||
    ! grep -q "ThreadSanitizer: data race" "$WORK/$broken.log"; then
    echo "a race of the bank's $broken was planted and not reported: this run proves nothing" >&2
    exit 1
  fi
done
echo "clean; the planted races were reported"
